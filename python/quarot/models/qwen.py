"""Qwen2 and Qwen2.5: LLaMA with biases on q, k and v (biases are read from the modules)."""

from quarot.models.base import Architecture

QWEN2 = Architecture(model_type="qwen2")
