"""Extraction of a dataset: plan the work, turn images into features, and write them to a cache."""
