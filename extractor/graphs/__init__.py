"""ONNX graphs: as files, as what they say of themselves, and as nodes that are cut and put in."""
