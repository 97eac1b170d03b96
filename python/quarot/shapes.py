"""Models of known shapes with random weights, made where they are to run.

For timing: time does not depend on what a model says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quarot import hf
from quarot.config import QuarotConfig
from quarot.convert import convert
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
    },
    hf.SMOLLM2: {},  # real weights
}

DTYPE = torch.bfloat16


@torch.no_grad()
def build(shape: str, preset: str | None, device: torch.device) -> Any:
    """Build a causal LM of a shape: converted to `preset`, or transformers' own for None.

    Random int4 weights are drawn as codes, so that a layer needs no more memory than it keeps.
    """
    if shape == hf.SMOLLM2:
        model = hf.load_model(hf.SMOLLM2, dtype=DTYPE, device=device)[0]
        return model if preset is None else convert(model, preset, progress=False)
    with torch.device("meta"):
        # Llama 3.1's length, whatever the shape: for positions in rotary's frequencies only.
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=False
        )
        model = LlamaForCausalLM(config).to(DTYPE).eval().requires_grad_(False)
    arch = describe(config)
    layers, rotary = model.get_submodule(arch.layers), model.get_submodule(arch.rotary)
    for name, frequencies in type(rotary)(config).named_buffers():
        setattr(rotary, name, frequencies.to(device))
    for path in (arch.embedding, arch.final_norm, arch.head):
        _materialise(model.get_submodule(path), device)
    if preset is None:
        _materialise(layers, device)
        return model
    own = QuarotConfig.from_preset(preset)
    for index, old in enumerate(layers):
        layers[index] = _random_layer(old, model.config, own, index, device)
    return hf.adopt(model, own)


def _materialise(module: torch.nn.Module, device: torch.device) -> None:
    """Give a module on the meta device memory, and values that keep activations near one."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _random_layer(
    old: Any, config: Any, own: QuarotConfig, index: int, device: torch.device
) -> Any:
    arch = describe(config)
    geometry = arch.geometry(config)
    layer = hf.new_layer(old, arch, geometry, own, index, DTYPE, "meta", "kernel")
    state: dict[str, Tensor] = {}
    for path, (rows, columns) in linear_shapes(arch, geometry).items():
        size = columns**-0.5
        if own.w_bits == 16:
            state[f"{path}.weight"] = size * torch.randn(rows, columns, dtype=DTYPE, device=device)
            continue
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        groups = columns // own.w_group if own.w_group else 1
        deviation = 4.6  # of uniform int4 codes
        state[f"{path}.weight_packed"] = packed
        state[f"{path}.weight_scale"] = torch.full((rows, groups), size / deviation, device=device)
    for path, entries in norm_shapes(arch, geometry).items():
        state[f"{path}.weight"] = torch.ones(entries, dtype=DTYPE, device=device)
    layer.load_state_dict(state, assign=True)
    layer.fuse()
    return layer
