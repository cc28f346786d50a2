"""Comparisons of bundles, of backbones and of numbers of labels, with confidence intervals."""
