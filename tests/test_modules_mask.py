"""Masks: what transformers builds under our name, and which masks a decoder layer takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

import quarot
from helpers import tiny_model
from quarot.modules import mask as masks

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LEFT_PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def build(attention_mask=None, cache=None, position_ids=None, tokens: int = 4, name="quarot"):
    """What transformers' model hands to its layers for `tokens` new tokens."""
    config = tiny_model().config
    config._attn_implementation = name
    return create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(2, tokens, 64),
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )


@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 4)])
def test_nothing_padded_is_no_mask(attention_mask) -> None:
    assert build(attention_mask) is None
    assert build(attention_mask, DynamicCache()) is None


def test_padding_is_kept_as_keys_only() -> None:
    got = build(LEFT_PADDED)
    assert got.dtype == torch.bool
    assert torch.equal(got, LEFT_PADDED.bool()[:, None, None])


def test_free_places_of_a_static_cache() -> None:
    cache = StaticCache(tiny_model().config, max_cache_len=6)
    assert build(torch.ones(2, 4), cache) is None
    expected = torch.cat([LEFT_PADDED.bool(), torch.zeros(2, 2, dtype=torch.bool)], 1)
    assert torch.equal(build(LEFT_PADDED, cache), expected[:, None, None])


def test_a_mask_that_forgets_the_new_tokens_hides_them() -> None:
    """As transformers does: keys beyond the mask are not seen, so this is not "nothing padded"."""
    cache = StaticCache(tiny_model().config, max_cache_len=6)
    assert build(torch.ones(2, 3), cache)[0, 0, 0].tolist() == [True] * 3 + [False] * 3


def test_packed_sequences_are_written_out() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    got = build(position_ids=positions)
    assert torch.equal(got, build(position_ids=positions, name="sdpa"))
    assert got.shape == (2, 1, 4, 4)
    assert not got[0, 0, 2, 1]


def test_the_name_only_runs_in_our_layers() -> None:
    model = tiny_model()
    model.config._attn_implementation = masks.NAME
    with pytest.raises(RuntimeError, match="runs only inside quarot's decoder layers"):
        model(IDS)


def test_padding_mask_is_cut_or_filled() -> None:
    assert masks.padding_mask(LEFT_PADDED, 3).tolist() == [[[[False, False, True]]], [[[True] * 3]]]
    assert masks.padding_mask(LEFT_PADDED, 5)[1, 0, 0].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("mask", [LEFT_PADDED, LEFT_PADDED.bool()[:, None, None]])
def test_kernel_mask(mask: torch.Tensor) -> None:
    got = masks.kernel_mask(mask, batch=2, tokens=3, length=4, capacity=64)
    assert got.shape == (2, 1, 3, 4)
    assert torch.equal(got, LEFT_PADDED.bool()[:, None, None].expand(2, 1, 3, 4))
    with pytest.raises(ValueError, match="attention_mask: covers 4 keys, needs all 5"):
        masks.kernel_mask(mask, batch=2, tokens=3, length=5, capacity=64)


def test_kernel_mask_of_one_row_serves_every_row() -> None:
    got = masks.kernel_mask(LEFT_PADDED[:1], batch=3, tokens=1, length=4, capacity=4)
    assert got.shape == (3, 1, 1, 4)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(2, 4),
        torch.ones(2, 4).int(),
        torch.ones(2, 1, 4, 4),
        torch.ones(2, 1, 1, 4) > 0,
    ],
)
def test_known_masks_pass(mask) -> None:
    assert masks.check_mask(mask) is mask


def test_a_model_names_the_mask_it_was_given() -> None:
    model = quarot.convert(tiny_model(), "W4A4KV4", progress=False)
    with pytest.raises(ValueError, match=r"attention_mask: got torch.int64 of shape \(1, 3, 3\)"):
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, 3, dtype=torch.int64))


def test_other_masks_are_refused() -> None:
    block = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    with pytest.raises(TypeError, match="attention_mask: got BlockMask"):
        masks.check_mask(block)
    with pytest.raises(ValueError, match=r"attention_mask: got torch.float32 of shape \(2, 4, 4\)"):
        masks.check_mask(torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="attention_mask: got torch.int64"):
        masks.check_mask(torch.ones(2, 1, 4, 4, dtype=torch.int64))
