"""Inference with ONNX Runtime, on the CPU and on one or several GPUs."""
