"""ONNX graphs of backbones: files, metadata, edits of nodes, CPU sessions and parity checks."""
