"""Commands for features, caches, backbones and weights: each parses its arguments, calls one function and prints."""
