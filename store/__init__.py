"""What is on disk: feature shards keyed by content, the sample table, fingerprints, splits. Knows no images or networks."""
