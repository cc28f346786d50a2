"""Backbones in lower precision: int8 for the CPU and float16 for GPUs, refused if their features are not close to float32."""
