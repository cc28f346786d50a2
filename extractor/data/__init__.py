"""Datasets: folders, manifests, tar shards and torchvision's datasets, listed as samples and read as bytes."""
