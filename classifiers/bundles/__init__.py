"""Bundles (saved heads): saving and loading, prediction, evaluation on held-out images, and fusing into one ONNX file."""
