"""Models of a known shape with random weights, for timing: what they say is noise."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quarot import hf
from quarot.config import QuarotConfig
from quarot.models import describe
from quarot.modules.canonical import linear_shapes, norm_shapes

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


def _config(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=False)


def _fill(module: torch.nn.Module, device: torch.device) -> None:
    """Give the parameters of a module on the meta device memory, and values as a model has."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)


@torch.no_grad()
def random_model(shape: str, preset: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a causal LM of a shape: converted to `preset`, or transformers' own for None.

    The quantized weights are drawn as codes, so that a layer needs no more memory than it keeps.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(_config(shape)).to(dtype)
    arch = describe(model.config)
    layers = model.get_submodule(arch.layers)
    if preset is not None:
        config, geometry = QuarotConfig.from_preset(preset), arch.geometry(model.config)
        for index, old in enumerate(layers):
            new = hf.new_layer(old, arch, geometry, config, index, dtype, "meta", "kernel")
            state: dict[str, torch.Tensor] = {}
            for path, (rows, columns) in linear_shapes(arch, geometry).items():
                groups = columns // config.w_group if config.w_group else 1
                state[f"{path}.weight_packed"] = torch.randint(
                    0, 256, (rows, columns // 2), dtype=torch.uint8, device=device
                )
                # int4 codes have a standard deviation of 4.6: outputs are then as large as inputs.
                state[f"{path}.weight_scale"] = torch.full(
                    (rows, groups), columns**-0.5 / 4.6, device=device
                )
            for path, size in norm_shapes(arch, geometry).items():
                state[f"{path}.weight"] = torch.ones(size, dtype=dtype, device=device)
            new.load_state_dict(state, assign=True)
            new.fuse()
            layers[index] = new
    rotary = model.get_submodule(arch.rotary)
    fresh = type(rotary)(model.config)
    for name, buffer in fresh.named_buffers():
        setattr(rotary, name, buffer.to(device))
    for path in (arch.embedding, arch.final_norm, arch.head):
        _fill(model.get_submodule(path), device)
    if preset is None:
        _fill(layers, device)
        return model.eval().requires_grad_(False)
    return hf.adopt(model, config)
