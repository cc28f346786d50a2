"""Backbones: the registry of networks, their weights and layers, and their export to ONNX files of features."""
