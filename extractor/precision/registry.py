"""The precisions by name: where each runs, and how a float32 backbone is converted to it. Imports no NumPy."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from store.errors import BadDataError

if TYPE_CHECKING:
    from extractor.data.samples import Sample
    from extractor.data.sources import Source
    from extractor.graphs.backbone_facts import BackboneFacts
    from extractor.signals import StopFlag
    from store.format.calibration import Calibration


class Conversion(Protocol):
    """Writes a float32 backbone in another precision, or refuses it."""

    def __call__(self, source: Path, out: Path, facts: BackboneFacts) -> tuple[BackboneFacts, Calibration | None]:
        """Return the facts of the new file, and the features it was judged on if these are kept.

        Raises:
            BadDataError: the features would move too far.
        """


@dataclass
class Report:
    """What a conversion has to say to the run that it was made in; it fills it in.

    Attributes:
        prepared: where the conversion is from: ``calibrated`` in this run, or the ``store`` of prepared backbones; else empty.
        core_seconds: what the run would not have taken without it.
        rates: images in a core-second by the float network and by the converted one.
        paths: of the images whose features come with the conversion, by content digest.
    """

    prepared: str = ""
    core_seconds: float = 0.0
    rates: tuple[float, float] = (0.0, 0.0)
    paths: dict[bytes, bytes] = field(default_factory=dict)

    def facts(self, images: int, views: int) -> dict[str, Any]:
        """As JSON: where it is from, what it cost, and from how many images on a run is shorter with it; None if never.

        Args:
            images: of the run.
            views: of each image.
        """
        exact, converted = self.rates
        if not converted:
            return {"prepared": self.prepared} if self.prepared else {}
        saved = (1 / exact - 1 / converted) * views
        pays_from = math.ceil(self.core_seconds / saved) if saved > 0 else None
        rates = {"fp32": round(exact, 1), "int8": round(converted, 1)}
        spent = round(self.core_seconds, 2)
        cost = {"core_seconds": spent, "images_per_core_second": rates, "images": images, "pays_from": pays_from}
        return {"prepared": self.prepared, **cost}


@dataclass(frozen=True)
class TrainingImages:
    """What a conversion may be calibrated on: the samples of a run, and the split that it will make if the source has none."""

    source: Source
    samples: Sequence[Sample]
    val: float
    test: float
    seed: int
    workers: int | None
    stop: StopFlag
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class Precision:
    """One precision of a backbone.

    Attributes:
        name: as in ``--precision``, and in the fingerprint.
        device: the kind of device that it is for, ``cpu`` or ``cuda``; empty for all.
        module: of this package, with ``conversion(images) -> Conversion`` and ``describe(calibration) -> str``; empty if the
            file stays as it is.
        once: converted once in the life of a cache, because another calibration would give other features.
        tf32: a GPU may round the products of float32.
        tolerance: largest difference of a probability (for a regression: of a number, as a share of the largest) on another
            machine or device. Sums in another order move features by 1e-6, and sometimes one of them to the next float16;
            int8 and float16 networks round at every layer.
    """

    name: str
    device: str = ""
    module: str = ""
    once: bool = False
    tf32: bool = False
    tolerance: float = 1e-3

    def conversion(self, images: TrainingImages) -> Conversion | None:
        """How a float32 file becomes one of this precision; None if it stays as it is."""
        conversion: Conversion | None = self._of("conversion")(images) if self.module else None
        return conversion

    def describe(self, calibration: dict[str, Any]) -> str:
        """The outcome of the conversion, in words; empty if the file stays as it is.

        Raises:
            BadDataError: these are not facts about such a conversion.
        """
        try:
            return str(self._of("describe")(calibration)) if self.module else ""
        except (KeyError, TypeError, ValueError) as error:
            message = f"the facts about the conversion to {self.name} cannot be read: {error}"
            raise BadDataError(message) from error

    def _of(self, name: str) -> Any:
        return getattr(importlib.import_module(f".{self.module}", __package__), name)


ROWS = (
    Precision("fp32"),
    Precision("tf32", "cuda", tf32=True),
    Precision("fp16", "cuda", "float16", tolerance=2e-2),
    Precision("int8", "cpu", "calibration", once=True, tolerance=1e-2),
)
PRECISIONS = {row.name: row for row in ROWS}


def precision_of(name: str) -> Precision:
    """The row of a name; an unknown name, of a file from elsewhere, is judged like float32."""
    return PRECISIONS.get(name, ROWS[0])
