"""Feature drift between two caches, image by image, and its causes: today's features against last month's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format.samples import Row
from store.progress.stages import staged

from .cache import FeatureCache
from .errors import BadDataError, display
from .fingerprint import short

Predict = Callable[[NDArray[np.floating[Any]]], NDArray[np.intp]]

WORST = 5
SAME = 1e-3  # two rows closer than this (relative L2) show the same image
MOSTLY = 0.9  # share of the drifted rows that one cause must explain
SEARCHED = 2000  # drifted rows looked at for a permutation

# relative L2 per row, see docs/regression.md
FLOAT32 = 1e-6  # CPU, other batch size or thread count
FLOAT16 = 5e-4  # stored as float16: a last-bit difference before rounding may round the other way
OTHER_PROVIDER = 1e-4  # CUDA fp32 with TF32 off against the CPU


@dataclass(frozen=True)
class ImageDrift:
    """One image: relative L2 and cosine of its features in B against those in A."""

    path: str
    relative_l2: float
    cosine: float


@dataclass(frozen=True)
class Drift:
    """The comparison of cache B with cache A.

    Attributes:
        common: images whose content is in both.
        only_a, only_b: images in one of them only.
        dtype_a, dtype_b: how the features are stored.
        views_a, views_b: per image; only the first ones, without augmentation, are compared.
        fingerprint: fields that differ, with (A, B).
        max_l2, mean_l2, min_cosine: over the common images.
        bound: largest relative L2 that the two fingerprints allow (docs/regression.md).
        worst: the images that moved most.
        relabelled: common images whose label differs.
        flips: common images for which a given head decides differently; None without a head.
        causes: what explains the differences, in words.
    """

    common: int
    only_a: int
    only_b: int
    dtype_a: str
    dtype_b: str
    fingerprint: dict[str, tuple[Any, Any]]
    max_l2: float
    mean_l2: float
    min_cosine: float
    bound: float
    worst: list[ImageDrift]
    relabelled: int
    flips: int | None = None
    causes: list[str] = field(default_factory=list)
    views_a: int = 1
    views_b: int = 1

    @property
    def passed(self) -> bool:
        """Whether B holds what A holds: the same images, labels and kind of storage, and features within the bound."""
        whole = not self.only_a and not self.only_b and not self.relabelled and self.dtype_a == self.dtype_b
        decided = {name for name in self.fingerprint if name != "provider" and not name.startswith("views.")}
        return whole and not decided and not self.flips and self.max_l2 <= self.bound

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def rows(self) -> list[tuple[str, str]]:
        """The comparison as a table of names and values."""
        rows = [
            ("images in both", str(self.common)),
            ("only in the first, only in the second", f"{self.only_a}, {self.only_b}"),
            ("stored as", self.dtype_a if self.dtype_a == self.dtype_b else f"{self.dtype_a} against {self.dtype_b}"),
            ("relative L2, largest (mean)", f"{self.max_l2:.1e} ({self.mean_l2:.1e}); allowed {self.bound:.0e}"),
            ("cosine, smallest", f"{self.min_cosine:.6f}"),
            ("other labels", str(self.relabelled)),
        ]
        if max(self.views_a, self.views_b) > 1:
            rows.append(("views of each image", f"{self.views_a}, {self.views_b}; the first are compared"))
        if self.flips is not None:
            rows.append(("decisions that flip", str(self.flips)))
        rows += [(f"fingerprint: {name}", f"{short(a)} against {short(b)}") for name, (a, b) in self.fingerprint.items()]
        if self.max_l2 > 0:
            rows += [(f"moved: {i.path}", f"{i.relative_l2:.1e}, cosine {i.cosine:.6f}") for i in self.worst]
        return rows


@staged("comparing the caches")
def compare_caches(a: FeatureCache, b: FeatureCache, *, predict: Predict | None = None, bound: float | None = None) -> Drift:
    """Compare two caches by image content; only the first view of each image counts.

    Args:
        a: the reference, such as last month's.
        b: what is compared with it.
        predict: class index for each row of features; counts decisions that flip.
        bound: allowed relative L2 per row; by default what the two fingerprints allow (docs/regression.md).

    Raises:
        BadDataError: they have no image in common, or features of different length.

    >>> import store
    >>> cache = store.FeatureCache("pets.cache")
    >>> drift = store.compare_caches(cache, cache)
    >>> drift.passed, drift.max_l2
    (True, 0.0)
    """
    rows_a, rows_b = _by_content(a), _by_content(b)
    common = sorted(set(rows_a) & set(rows_b))
    if not common:
        raise BadDataError(_nothing_in_common(a, b))
    if a.dim != b.dim:
        message = f"{a.path} has {a.dim} features a row and {b.path} has {b.dim}: they are of different layers or backbones"
        raise BadDataError(message)
    X, Y = a.features(common), b.features(common)
    l2, cosine = _distances(X, Y)
    order = np.argsort(-l2, kind="stable")[:WORST].tolist()
    differences = a.fingerprint.differences(b.fingerprint)
    relabelled = [key for key in common if rows_a[key].label != rows_b[key].label]
    flips = None if predict is None else int((predict(X) != predict(Y)).sum())
    allowed = _bound(a, b, differences) if bound is None else bound
    return Drift(
        common=len(common),
        only_a=len(rows_a) - len(common),
        only_b=len(rows_b) - len(common),
        dtype_a=str(a.dtype),
        dtype_b=str(b.dtype),
        fingerprint=differences,
        max_l2=float(l2.max()),
        mean_l2=float(l2.mean()),
        min_cosine=float(cosine.min()),
        bound=allowed,
        worst=[ImageDrift(rows_b[common[i]].name, float(l2[i]), float(cosine[i])) for i in order],
        relabelled=len(relabelled),
        flips=flips,
        causes=[
            *_fingerprint_causes(differences),
            *_label_causes([(str(rows_a[key].label), str(rows_b[key].label)) for key in relabelled]),
            *_permutation_causes(X, Y, l2, max(allowed, SAME)),
            *([f"stored as {b.dtype} instead of {a.dtype}"] if a.dtype != b.dtype else []),
        ],
        views_a=a.views,
        views_b=b.views,
    )


def _by_content(cache: FeatureCache) -> dict[bytes, Row]:
    return {row.sha256: row for row in reversed(cache.rows())}


def _distances(X: NDArray[Any], Y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per row: relative L2 of Y against X, and cosine."""
    l2, cosine = np.empty(len(X)), np.empty(len(X))
    for start in range(0, len(X), 4096):  # in blocks: float64 copies of everything would not fit
        x, y = X[start : start + 4096].astype(np.float64), Y[start : start + 4096].astype(np.float64)
        difference, nx, ny = (np.linalg.norm(v, axis=1) for v in (y - x, x, y))
        part = slice(start, start + 4096)
        l2[part] = np.divide(difference, nx, out=np.where(difference == 0, 0.0, np.inf), where=nx > 0)
        l2[part][np.isnan(l2[part])] = np.inf  # no bound holds for it
        equal = (difference == 0).astype(np.float64)
        cosine[part] = np.divide((x * y).sum(axis=1), nx * ny, out=equal, where=(nx > 0) & (ny > 0))
    return l2, cosine


def _bound(a: FeatureCache, b: FeatureCache, differences: dict[str, tuple[Any, Any]]) -> float:
    fp16 = np.dtype(np.float16) in (a.dtype, b.dtype)
    provider = OTHER_PROVIDER if "provider" in differences else FLOAT32
    return max(provider, FLOAT16 if fp16 else 0.0)


def _fingerprint_causes(differences: dict[str, tuple[Any, Any]]) -> list[str]:
    causes = []
    for name, (mine, theirs) in differences.items():
        if name in ("pixels.resize", "pixels.crop"):
            causes.append(f"other resolution: {name.removeprefix('pixels.')} {mine} against {theirs} pixels")
        elif name == "weights":
            causes.append(f"other weights: {short(mine)} against {short(theirs)}")
        elif name == "pixels.probe":
            if set(differences).isdisjoint({"pixels.resize", "pixels.crop", "pixels.interpolation", "pixels.path"}):
                causes.append("another decoder or resampler: the same settings give other pixels")
        elif not name.startswith("views."):  # the first view, which is compared, does not depend on them
            causes.append(f"other {name}: {short(mine)} against {short(theirs)}")
    return causes


def _label_causes(pairs: list[tuple[str, str]]) -> list[str]:
    counts = Counter(pairs)
    swapped = sorted({tuple(sorted(pair)) for pair in counts if (pair[1], pair[0]) in counts})
    causes = [f"labels swapped: {x} and {y}, {counts[x, y] + counts[y, x]} images" for x, y in swapped]
    rest = sum(n for pair, n in counts.items() if tuple(sorted(pair)) not in swapped)
    return [*causes, *([f"{rest} images have another label"] if rest else [])]


def _permutation_causes(X: NDArray[Any], Y: NDArray[Any], l2: NDArray[np.float64], bound: float) -> list[str]:
    """Whether drifted rows of Y are the rows of other images in X: the features were assigned to the wrong images."""
    drifted = np.flatnonzero(l2 > bound)[:SEARCHED]
    if len(drifted) < 2:
        return []
    reference, vectors = X[l2 > bound].astype(np.float32), Y[drifted].astype(np.float32)
    squared = (reference**2).sum(axis=1)
    matches = 0
    for start in range(0, len(vectors), 256):
        block = vectors[start : start + 256]
        nearest = (squared - 2 * block @ reference.T).argmin(axis=1)
        matches += int((_distances(reference[nearest], block)[0] <= SAME).sum())
    if matches < MOSTLY * len(drifted):
        return []
    return [f"permutation: {matches} of {len(drifted)} drifted rows are the features of other images; rows were mixed up"]


def _nothing_in_common(a: FeatureCache, b: FeatureCache) -> str:
    paths = {row.path for row in a.rows()} & {row.path for row in b.rows()}
    if not paths:
        return f"{a.path} and {b.path} have no image in common"
    example = display(min(paths))
    return (
        f"{a.path} and {b.path} have no image content in common, but {len(paths)} paths (such as {example}): the files were "
        f"written again, for example with another resolution or compression"
    )
