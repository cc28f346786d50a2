"""What is on disk: feature shards keyed by content, the sample table, fingerprints, splits. Knows no images or networks."""

from . import environment  # noqa: F401 - before any library that reads it is imported
