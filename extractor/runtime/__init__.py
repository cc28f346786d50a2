"""ONNX Runtime on the CPU and on GPUs, one or several."""
