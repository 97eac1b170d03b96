"""Architectures as data: every path a description names exists, and geometry is read or refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from torch import nn

from helpers import MODEL_SHAPES, tiny_model
from quarot.models import ARCHITECTURES, describe
from quarot.models.llama import LLAMA
from quarot.models.qwen import QWEN2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_paths_resolve_in_transformers_model(family: str) -> None:
    model = tiny_model(family)
    arch = describe(model.config)
    assert arch.model_type == family
    assert isinstance(model.get_submodule(arch.embedding), nn.Embedding)
    assert isinstance(model.get_submodule(arch.head), nn.Linear)
    for path in (arch.decoder, arch.rotary, arch.final_norm):
        model.get_submodule(path)
    layer = model.get_submodule(arch.layers)[0]
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    norms = {name for name, _ in layer.named_children() if name.endswith("norm")}
    assert linears == set(arch.linears)
    assert norms == set(arch.norm_readers)
    assert (
        set(arch.residual_writers) | {r for rs in arch.norm_readers.values() for r in rs} == linears
    )


@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_geometry_is_the_shape_of_the_weights(shape: str) -> None:
    model = tiny_model(**MODEL_SHAPES[shape])
    arch = describe(model.config)
    g = arch.geometry(model.config)
    layers = model.get_submodule(arch.layers)
    sizes = {path: tuple(layers[0].get_submodule(path).weight.shape) for path in arch.linears}
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    assert len(layers) == g.layers
    assert sizes == {
        arch.q: (q, g.hidden),
        arch.k: (kv, g.hidden),
        arch.v: (kv, g.hidden),
        arch.o: (g.hidden, q),
        arch.gate: (g.intermediate, g.hidden),
        arch.up: (g.intermediate, g.hidden),
        arch.down: (g.hidden, g.intermediate),
    }
    assert g.norm_eps == model.config.rms_norm_eps


def test_a_description_is_all_that_tells_families_apart() -> None:
    assert dataclasses.replace(QWEN2, model_type="llama") == LLAMA
    assert all(name == arch.model_type for name, arch in ARCHITECTURES.items())


@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_unknown_architecture(model_type: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"model: got model_type .*needs one of \['llama', 'qwen2'\]"
    ):
        describe(SimpleNamespace(model_type=model_type))


@pytest.mark.parametrize(
    ("name", "known"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_activation_names(name: str, known: str) -> None:
    config = tiny_model().config
    config.hidden_act = name
    assert LLAMA.geometry(config).activation == known


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "relu", "hidden_act: got 'relu'"),
        ("num_key_value_heads", 3, "num_key_value_heads: got 3, needs a divisor of 4"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types: got"),
    ],
)
def test_what_no_kernel_computes_is_refused(field: str, value: object, message: str) -> None:
    config = tiny_model().config
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        LLAMA.geometry(config)
