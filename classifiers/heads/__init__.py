"""Heads: small scikit-learn estimators on cached features; once fitted, each is a set of arrays and an ONNX graph."""
