"""What it takes to have a head from images: the passes over those that it was fitted and chosen on, and its training.

What a head is only reported on costs it nothing, whether its features were extracted with the others or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from classifiers.bundles.bundle import Bundle


def fitted_share(bundle: Bundle) -> float:
    """The share of a bundle's extraction that was for images which it was fitted or chosen on."""
    passes = bundle.cost["images"] if bundle.kind == "frozen" else 0
    views = (bundle.hyperparameters.get("views") or {}).get("count", 1)
    return min(len(bundle.fitted()) * views / passes, 1.0) if passes else 1.0


def needed(cost: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """The part of a `Bundle.cost` that the head needs.

    Args:
        share: of the extraction, see `fitted_share`.

    Returns:
        ``extract_seconds`` and ``images`` (passes through the network), with everything that the head took from which a
        network was fine-tuned; ``train_seconds``; and ``energy``, of everything extracted in bundles from before.
    """
    start = cost.get("init_head") or {"extract_seconds": 0.0, "train_seconds": 0.0, "images": 0, "energy": None}
    energies = [cost.get("energy"), start["energy"], (share - 1) * (cost.get("extract_energy") or 0.0)]
    known = [each for each in energies[:2] if each is not None]
    return {
        "extract_seconds": share * cost["extract_seconds"] + start["extract_seconds"] + start["train_seconds"],
        "train_seconds": float(cost["train_seconds"]),
        "images": round(share * cost["images"]) + start["images"],
        "energy": sum(known) + energies[2] if known else None,
    }
