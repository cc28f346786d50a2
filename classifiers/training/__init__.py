"""From a cache to a bundle: who may look at what, fit, judge, save."""
