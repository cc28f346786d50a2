"""Training heads on a cache: the role of each sample, fit, judge, save as a bundle."""
