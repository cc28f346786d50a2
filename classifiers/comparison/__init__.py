"""Bundles, backbones and numbers of labels side by side, with differences that can be trusted."""
