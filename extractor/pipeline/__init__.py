"""The run over a dataset: what must be done, images to features, features to a cache."""
