"""Attention on 16-bit keys: every kind of mask against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quarot.modules.attention import attend, causal, rope

B, H, HKV, D = 2, 4, 2, 16
SCALE = D**-0.5


def inputs(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    return (
        torch.randn(B, H, queries, D, generator=generator),
        torch.randn(B, HKV, keys, D, generator=generator),
        torch.randn(B, HKV, keys, D, generator=generator),
    )


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention in float64; `bias` [B, 1 or H, S, L] with -inf where a key is not seen."""
    k, v = (x.double().repeat_interleave(H // HKV, dim=1) for x in (k, v))
    scores = q.double() @ k.mT * SCALE + bias.double()
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights.nan_to_num(0) @ v


def bias_of(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() < 2e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(5, 5, 0), (1, 7, 6), (3, 7, 4), (3, 9, 2), (1, 9, 4)]
)
@pytest.mark.parametrize("on_device", [False, True])
def test_no_mask_is_causal(queries: int, keys: int, offset: int, on_device: bool) -> None:
    q, k, v = inputs(queries, keys)
    visible = torch.ones(queries, keys).tril(offset).bool()
    got = attend(q, k, v, None, SCALE, torch.tensor(offset) if on_device else offset)
    assert close(got, exact(q, k, v, bias_of(visible)))
    assert torch.equal(causal(queries, keys, offset, q.device), visible)


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize(("queries", "offset"), [(6, 0), (2, 4), (1, 5)])
def test_padding_comes_on_top_of_causality(queries: int, offset: int, four: bool) -> None:
    q, k, v = inputs(queries, 6)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    visible = torch.ones(queries, 6).tril(offset).bool() & padding.bool()[:, None, None]
    mask = padding.bool()[:, None, None] if four else padding
    got = attend(q, k, v, mask, SCALE, offset)
    assert close(got, exact(q, k, v, bias_of(visible)))
    if queries == 6:
        assert not got[0, :, :2].any()  # these see nothing


def test_written_out_masks_are_taken_as_they_are() -> None:
    """Also where they let a query see the future (prefix language models)."""
    q, k, v = inputs(4, 6)
    visible = torch.rand(B, H, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    visible[0, 1, 2] = False
    bias = torch.randn(visible.shape, generator=torch.Generator().manual_seed(1))
    bias = bias.masked_fill(~visible, -math.inf)
    assert close(attend(q, k, v, visible, SCALE), exact(q, k, v, bias_of(visible)))
    got = attend(q, k, v, bias, SCALE)
    assert close(got, exact(q, k, v, bias))
    assert not got[0, 1, 2].any()
    longer = torch.cat([bias, torch.zeros(B, H, 4, 3)], -1)
    assert torch.equal(attend(q, k, v, longer, SCALE), got)


def test_a_mask_that_is_too_short_is_refused() -> None:
    q, k, v = inputs(2, 6)
    with pytest.raises(ValueError, match="attention_mask: covers 5 keys, needs all 6"):
        attend(q, k, v, torch.zeros(B, 1, 2, 5), SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_transformers_rope(dtype: torch.dtype) -> None:
    q, k, _ = (x.to(dtype) for x in inputs(5, 5))
    angle = torch.rand(1, 5, D // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    exact_q, exact_k = apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    for x, want, other in ((q, exact_q, theirs[0]), (k, exact_k, theirs[1])):
        got = rope(x, cos, sin)
        assert got.dtype == dtype
        assert (got - want).norm() <= (other - want).norm()


def test_partial_rope_leaves_the_rest() -> None:
    q, _, _ = inputs(5, 5)
    angle = torch.rand(B, 5, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2)
    got = rope(q, angle.cos(), angle.sin())
    assert torch.equal(got[..., 8:], q[..., 8:])
    assert torch.equal(got[..., :8], rope(q[..., :8], angle.cos(), angle.sin()))
    assert torch.allclose(got.norm(dim=-1), q.norm(dim=-1))
