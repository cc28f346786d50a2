"""Backbones in fewer bits: int8 for the CPU, float16 for GPUs, each proven near to float32 or refused."""
