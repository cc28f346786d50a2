"""Assertions for regression tests on cached features and on metrics, to import in your own tests.

::

    from store.testing import assert_features_match, assert_metrics_match

    def test_features_are_last_months():
        assert_features_match("today.cache", "golden.h5")

    def test_scores_are_last_months():
        assert_metrics_match("today.head/head.json", "golden-head.json", tolerance=0.005)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cache import FeatureCache
from .drift import compare_caches

METRICS = ("accuracy", "macro_f1", "log_loss")


def assert_features_match(cache: str | Path, golden: str | Path, *, bound: float | None = None) -> None:
    """Fail unless a cache holds the images, labels, storage type and features of a golden one.

    Args:
        cache: the cache under test: a folder or a compact file.
        golden: the reference.
        bound: allowed relative L2 per row; by default what the two fingerprints allow (docs/regression.md).

    Raises:
        AssertionError: with the causes and a table of what drifted.
        PenultError: one of them cannot be read, or they have nothing in common.

    >>> from store.testing import assert_features_match
    >>> assert_features_match("pets.cache", "pets.cache")
    """
    drift = compare_caches(FeatureCache(golden), FeatureCache(cache), bound=bound)
    if not drift.passed:
        table = "\n".join(f"  {name}: {value}" for name, value in drift.rows())
        message = f"{cache} does not match {golden}: {'; '.join(drift.causes) or 'the features drifted'}\n{table}"
        raise AssertionError(message)


def assert_metrics_match(
    metrics: Mapping[str, Any] | str | Path, golden: Mapping[str, Any] | str | Path, *, tolerance: float = 0.0
) -> None:
    """Fail unless accuracy, macro F1 and log-loss are within a tolerance of the golden ones, on the same number of images.

    Args:
        metrics: an evaluation as JSON (`penult evaluate --json`), a bundle's ``head.json``, or the path of either.
        golden: the reference.
        tolerance: allowed absolute difference of each score.

    Raises:
        AssertionError: names the scores that differ.

    >>> from store.testing import assert_metrics_match
    >>> assert_metrics_match("pets.head/head.json", "pets.head/head.json", tolerance=0.005)
    """
    actual, expected = _metrics(metrics), _metrics(golden)
    wrong = [f"n: {actual['n']} against {expected['n']}"] if actual["n"] != expected["n"] else []
    wrong += [
        f"{name}: {actual[name]:.6f} against {expected[name]:.6f}"
        for name in METRICS
        if not abs(actual[name] - expected[name]) <= tolerance
    ]
    if wrong:
        message = f"the scores differ by more than {tolerance}: {'; '.join(wrong)}"
        raise AssertionError(message)


def _metrics(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    facts = source if isinstance(source, Mapping) else json.loads(Path(source).read_text("utf-8"))
    metrics: Mapping[str, Any] = facts.get("metrics", facts)
    return metrics
