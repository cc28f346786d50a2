"""From features to decisions: heads, evaluation, bundles, prediction, fine-tuning for comparison, jobs."""

import store  # noqa: F401 - its environment comes before any library that reads it
