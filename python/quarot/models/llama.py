"""LLaMA 1 to 3.x and every model that transformers loads as `LlamaForCausalLM` (SmolLM2 …)."""

from quarot.models.base import Architecture

LLAMA = Architecture(model_type="llama")
