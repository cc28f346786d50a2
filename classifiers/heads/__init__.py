"""Heads: small estimators on features, each of which becomes arrays and an ONNX graph."""
