"""What several test files share: tiny random models, error metrics, guarded memory."""

from __future__ import annotations

from typing import Any

import torch


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny random causal LM in eval mode, float32 unless `dtype` is given.

    The defaults have GQA (4 heads on 2), hidden 64 = 2^6, intermediate 96 = 12 * 8, untied
    embeddings. Norm weights and biases are random too, so that a fold that forgets them shows.

    Args:
        family: "llama" or "qwen2" (biases on q, k and v).
        seed: seed of the weights.
        overrides: fields of the transformers config, such as num_attention_heads=3, hidden_size=96,
            num_key_value_heads=3 (MHA), tie_word_embeddings=True, attention_bias=True, head_dim=32;
            and `dtype`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    dtype = overrides.pop("dtype", torch.float32)
    fields: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**fields, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
                elif name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
                else:  # rows of unit length keep every activation, and the logits, near one
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "head_dim": {"head_dim": 32},
    "3-heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
    "9-heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288},
    "36*2^k": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 288,
        "head_dim": 64,
    },
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True},
}
"""The shapes that rotation and conversion must hold for: name -> arguments of `tiny_model`."""
