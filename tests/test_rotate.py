"""Rotation: in float64, no step alone and not the whole changes the logits of any kind of model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from helpers import MODEL_SHAPES, tiny_model
from quarot import hadamard, rotate
from quarot.config import QuarotConfig
from quarot.models import describe

SHAPES = {**MODEL_SHAPES, "mlp_bias": {"mlp_bias": True, "attention_bias": True}}

OFF = {"r1": False, "r2": False, "r3": False, "r4": False, "head_hadamard": False}
STEPS = {
    "fold": {"r1": True, "rotation": "given"},  # with the identity as R1
    "r1": {"r1": True},
    "r1-random": {"r1": True, "rotation": "random"},
    "r1-given": {"r1": True, "rotation": "given"},
    "r2": {"r2": True},
    "r2-random": {"r2": True, "rotation": "random"},
    "r2-given": {"r2": True, "rotation": "given"},
    "head_hadamard": {"head_hadamard": True},
    "r4": {"r4": True},
    "r3": {"r3": True},
    "all": dict.fromkeys(OFF, True),
    "all-random": {**dict.fromkeys(OFF, True), "rotation": "random"},
    "all-given": {**dict.fromkeys(OFF, True), "rotation": "given"},
}
READERS = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
R1 = READERS | NORMS | {"embed_tokens.weight", "lm_head.weight"}
R1 |= {f"{linear}.{kind}" for linear in ("o_proj", "down_proj") for kind in ("weight", "bias")}
R2 = {"v_proj.weight", "v_proj.bias", "o_proj.weight"}
# What a step may change, and must change where the model has it.
CHANGES = {
    "fold": READERS | NORMS | {"lm_head.weight"},
    "r1": R1,
    "r2": R2,
    "head_hadamard": {"o_proj.weight"},
    "r4": {"down_proj.weight"},
    "r3": set(),
    "all": R1 | R2,
}
IDS = torch.tensor([[1, 17, 93, 4, 55, 55, 120, 8, 31], [1, 2, 3, 99, 64, 77, 101, 12, 5]])


def model64(**shape):
    """A tiny model that is float64 throughout: transformers' RMSNorm rounds to float32."""
    model = tiny_model(**shape, dtype=torch.float64)
    arch = describe(model.config)
    for parent in (model.model, *model.get_submodule(arch.layers)):
        for name, norm in list(parent.named_children()):
            if "norm" in name:
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


def config_of(step: str) -> QuarotConfig:
    return QuarotConfig(**{**OFF, **STEPS[step]}, seed=3)


def matrices_of(config: QuarotConfig, step: str, geometry) -> dict | None:
    """R1 and a list of R2: random ones, made apart from what `rotate` makes."""
    if config.rotation != "given":
        return None
    given = {}
    if config.r1:
        r1 = hadamard.random_orthogonal(geometry.hidden, 77)
        given["r1"] = torch.eye(geometry.hidden) if step == "fold" else r1
    if config.r2:
        size, layers = geometry.head_dim, range(geometry.layers)
        given["r2"] = [hadamard.random_orthogonal(size, 88 + layer) for layer in layers]
    return given


def rotate_queries_and_keys(module, query, key, value, attention_mask, **kwargs):
    """R3 as attention: queries and keys, which come after RoPE, times one Hadamard matrix."""
    query, key = hadamard.transform(query), hadamard.transform(key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("test_r3", rotate_queries_and_keys)
AttentionMaskInterface.register("test_r3", sdpa_mask)


def run_online(model, config: QuarotConfig) -> None:
    """Add what a converted model computes at run time, to a transformers model."""
    arch = describe(model.config)
    heads = arch.geometry(model.config).heads

    def across_heads(module, args):
        return (hadamard.transform_heads(args[0].unflatten(-1, (heads, -1))).flatten(-2),)

    for layer in model.get_submodule(arch.layers):
        if config.head_hadamard:
            layer.get_submodule(arch.o).register_forward_pre_hook(across_heads)
        if config.r4:
            layer.get_submodule(arch.down).register_forward_pre_hook(
                lambda module, args: (hadamard.transform(args[0]),)
            )
    if config.r3:
        model.config._attn_implementation = "test_r3"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@functools.cache
def original_of(shape: str):
    model = model64(**SHAPES[shape])
    return model, logits(model)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_logits_stay(step: str, shape: str) -> None:
    original, expected = original_of(shape)
    model = copy.deepcopy(original)
    arch, config = describe(model.config), config_of(step)
    geometry = arch.geometry(model.config)

    rotate.rotate_model(model, arch, config, matrices_of(config, step, geometry))
    after = dict(model.named_parameters(remove_duplicate=False))
    run_online(model, config)

    assert (logits(model) - expected).norm() <= 1e-9 * expected.norm()
    before = dict(original.named_parameters(remove_duplicate=False))
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    may = CHANGES[step.split("-")[0]]
    if step == "head_hadamard" and hadamard.split(geometry.heads)[0] == 1:
        may = set()
    assert changed == {n for n in after if n.split(".", n.count(".") - 1)[-1] in may}


@pytest.mark.parametrize("step", ["r4", "head_hadamard"])
def test_the_online_part_is_needed(step: str) -> None:
    """Guards the test above: with only one of the two halves of a step the logits differ."""
    model = model64()
    expected = logits(model)
    rotate.rotate_model(model, describe(model.config), config_of(step))
    assert (logits(model) - expected).norm() > 1e-3 * expected.norm()


def test_untying_keeps_the_logits_and_frees_the_head() -> None:
    model = tiny_model(tie_word_embeddings=True, dtype=torch.float64)
    expected = logits(model)
    rotate.untie_embeddings(model, describe(model.config))
    assert torch.equal(logits(model), expected)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # what loading and resizing call
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.model.embed_tokens.weight.count_nonzero() > 0


def test_untying_leaves_an_untied_model_alone() -> None:
    model = tiny_model()
    head = model.lm_head.weight
    rotate.untie_embeddings(model, describe(model.config))
    assert model.lm_head.weight is head


def test_no_rotation_touches_nothing() -> None:
    model = tiny_model(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    rotate.rotate_model(model, describe(model.config), QuarotConfig.from_preset("W4A4KV4-rtn"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_float64_with_one_rounding(dtype: torch.dtype) -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True, dtype=dtype)
    exact = copy.deepcopy(model).double()
    config = QuarotConfig()
    for each in (model, exact):
        rotate.rotate_model(each, describe(each.config), config)
    for (name, got), want in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype)), name


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_the_seed_decides(rotation: str) -> None:
    def embedding(seed: int) -> torch.Tensor:
        model = tiny_model()
        config = QuarotConfig(rotation=rotation, seed=seed)
        rotate.rotate_model(model, describe(model.config), config)
        return model.model.embed_tokens.weight.detach()

    assert torch.equal(embedding(5), embedding(5))
    assert not torch.equal(embedding(5), embedding(6))


def test_random_r2_differs_between_layers() -> None:
    geometry = describe(tiny_model().config).geometry(tiny_model().config)
    rotations = rotate.Rotations.from_config(QuarotConfig(rotation="random"), geometry)
    identity = torch.eye(geometry.head_dim, dtype=torch.float64)
    first, second = (apply(identity) for apply in rotations.r2)
    assert not torch.allclose(first, second)


def test_rotation_spreads_an_outlier() -> None:
    """What it is for: a weight column 100 times the others no longer stands out."""
    model = tiny_model()
    arch = describe(model.config)
    reader: nn.Linear = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        reader.weight[:, 5] *= 100
    rotate.rotate_model(model, arch, QuarotConfig())
    columns = reader.weight.detach().square().sum(0)
    assert columns.max() < 3 * columns.median()


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (None, r"matrices: got \[\], needs \['r1', 'r2'\]"),
        ({"r1": torch.eye(64)}, r"matrices: got \['r1'\]"),
        ({"r1": torch.eye(64), "r2": torch.eye(16), "r4": torch.eye(96)}, "matrices: got"),
        ({"r1": torch.eye(32), "r2": torch.eye(16)}, r"r1: got \(32, 32\).*\(64, 64\)"),
        ({"r1": torch.eye(64) * 1.001, "r2": torch.eye(16)}, "r1: not orthogonal"),
        ({"r1": torch.full((64, 64), torch.nan), "r2": torch.eye(16)}, "r1: not orthogonal"),
        ({"r1": torch.eye(64), "r2": [torch.eye(16)] * 3}, "r2: got 3 matrices, needs one, or 2"),
        ({"r1": torch.eye(64), "r2": [torch.eye(16), torch.ones(16, 16)]}, r"r2\[1\]: not orth"),
    ],
)
def test_given_matrices_are_checked(matrices, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        rotate.rotate_model(model, describe(model.config), QuarotConfig(rotation="given"), matrices)


def test_matrices_need_a_config_that_reads_them() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="matrices: got some for rotation 'hadamard'"):
        rotate.rotate_model(model, describe(model.config), QuarotConfig(), {"r1": torch.eye(64)})
