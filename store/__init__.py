"""The feature cache: shards of features keyed by content hash, the sample table, fingerprints and splits.

The names in ``__all__`` are public. Each is imported on first use, so that importing this package is cheap.

>>> import store
>>> store.FeatureCache("pets.cache").subset("test")
<Subset 'test': 6 images, 16 float16 features>
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import environment  # noqa: F401 - before any library that reads it is imported
from .faces import lazily

if TYPE_CHECKING:
    from .cache import FeatureCache as FeatureCache
    from .cache import Subset as Subset
    from .compact import write_compact as write_compact
    from .drift import compare_caches as compare_caches
    from .errors import PenultError as PenultError
    from .fingerprint import Fingerprint as Fingerprint
    from .testing import assert_features_match as assert_features_match
    from .testing import assert_metrics_match as assert_metrics_match
    from .verify import verify_cache as verify_cache

HOME = {
    "FeatureCache": "cache",
    "Subset": "cache",
    "Fingerprint": "fingerprint",
    "PenultError": "errors",
    "assert_features_match": "testing",
    "assert_metrics_match": "testing",
    "compare_caches": "drift",
    "verify_cache": "verify",
    "write_compact": "compact",
}
__all__ = sorted(HOME)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, HOME)
