"""Networks: their names, weights and layers, and how each becomes an ONNX file of features."""
