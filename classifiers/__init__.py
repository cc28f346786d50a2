"""From features to decisions: heads, evaluation, bundles, prediction, fine-tuning for comparison, jobs."""
