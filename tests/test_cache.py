"""The quantized cache layer keeps its tokens through every operation of a transformers cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from helpers import cache_values
from quarot.cache import CacheSpec, QuantizedLayer, adopt
from quarot.ops import reference

SPEC = CacheSpec(bits=4, kv_heads=2, head_dim=32)
CPU = torch.device("cpu")


def append(layer: QuantizedLayer, tokens: int, batch: int = 3, seed: int = 0) -> None:
    """Append random tokens as a decoder layer does."""
    spec = layer.spec
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, spec.kv_heads, spec.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    turn = torch.zeros(1, tokens, spec.head_dim)
    start, _ = layer.reserve(batch, tokens, CPU)
    reference.rope_hadamard_kv_append(
        k, k, v, turn + 1, turn, *layer.buffers, start, bits=spec.bits
    )
    layer.advance(tokens)


def filled(tokens: int = 5, batch: int = 3, max_cache_len: int | None = None) -> QuantizedLayer:
    layer = QuantizedLayer(SPEC, max_cache_len)
    append(layer, tokens, batch)
    return layer


def stored(layer: QuantizedLayer) -> list[Tensor]:
    """The buffers' used part: exact, unlike values."""
    return [buffer[:, :, : layer.length].clone() for buffer in layer.buffers]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def consistent(layer: QuantizedLayer) -> bool:
    """The host's and the device's idea of the length agree."""
    start, end = layer.reserve(layer.batch_size, 0, CPU)
    return start.tolist() == end.tolist() == [layer.length] * layer.batch_size


# --- storage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_returns_what_was_appended(bits: int) -> None:
    spec = CacheSpec(bits=bits, kv_heads=2, head_dim=32)
    layer = QuantizedLayer(spec)
    append(layer, 7)
    append(layer, 1, seed=1)
    for (codes, scale, zero), values in zip(
        (layer.buffers[:3], layer.buffers[3:]), layer.dequantize(torch.float32), strict=True
    ):
        exact = cache_values(codes, scale, zero, bits)[:, :, :8]
        assert values.shape == (3, 2, 8, 32)
        assert torch.equal(values.double(), exact)  # a product of 11 and 8 bits is exact in float32
        assert values.unique().numel() > 2**bits  # not all the same token


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_a_token(bits: int) -> None:
    layer = QuantizedLayer(CacheSpec(bits=bits, kv_heads=2, head_dim=32), max_cache_len=10)
    append(layer, 1, batch=1)
    assert sum(b.nbytes for b in layer.buffers) == 2 * 2 * 10 * (32 * bits // 8 + 2 + 1)


def test_growing_keeps_tokens() -> None:
    layer, whole = QuantizedLayer(SPEC), QuantizedLayer(SPEC, max_cache_len=600)
    capacities = []
    for seed, tokens in enumerate((60, 4, 1, 300, 1)):
        append(layer, tokens, seed=seed)
        append(whole, tokens, seed=seed)
        capacities.append(layer.capacity)
    assert capacities == [64, 64, 320, 576, 576]
    assert same(stored(layer), stored(whole))
    assert consistent(layer)


def test_growing_is_amortised() -> None:
    layer = QuantizedLayer(SPEC)
    capacities = set()
    for _ in range(3000):
        layer.reserve(1, 1, CPU)
        layer.advance(1)
        capacities.add(layer.capacity)
    assert len(capacities) <= 12
    assert max(capacities) <= 1.5 * 3000 + 64


def test_growing_does_not_overshoot_a_first_prompt() -> None:
    assert filled(tokens=2048, batch=1).capacity == 2048


def test_static_capacity_is_checked_before_anything_is_written() -> None:
    layer = filled(tokens=6, max_cache_len=8)
    addresses = [buffer.data_ptr() for buffer in layer.buffers]
    before = stored(layer)
    with pytest.raises(ValueError, match="6 tokens are stored and 3 more came.*max_cache_len = 8"):
        layer.reserve(3, 3, CPU)
    layer.reserve(3, 2, CPU)
    assert addresses == [buffer.data_ptr() for buffer in layer.buffers]
    assert same(stored(layer), before)
    assert consistent(layer)


def test_another_batch_size_is_refused_while_text_is_held() -> None:
    layer = filled(batch=3)
    with pytest.raises(ValueError, match="holds 5 tokens of batch 3 on cpu, got batch 2"):
        layer.reserve(2, 1, CPU)


@pytest.mark.parametrize("max_cache_len", [None, 8])
def test_reset_takes_a_new_text_of_another_batch(max_cache_len: int | None) -> None:
    layer = filled(max_cache_len=max_cache_len)
    layer.reset()
    layer.reset()
    assert layer.get_seq_length() == 0
    append(layer, 4, batch=2, seed=9)
    fresh = QuantizedLayer(SPEC)
    append(fresh, 4, batch=2, seed=9)
    assert same(stored(layer), stored(fresh))
    assert consistent(layer)


def test_reset_of_a_static_layer_keeps_its_addresses() -> None:
    layer = filled(max_cache_len=8)
    addresses = [buffer.data_ptr() for buffer in layer.buffers]
    layer.reset()
    append(layer, 2)
    assert addresses == [buffer.data_ptr() for buffer in layer.buffers]
    assert consistent(layer)


def test_layers_of_a_cache_share_lengths_that_keep_their_addresses() -> None:
    cache = DynamicCache()
    layers = [adopt(cache, index, SPEC) for index in range(3)]
    addresses = set()
    for before, tokens in ((0, 5), (5, 1), (6, 1), (7, 3)):
        for layer in layers:
            start, end = layer.reserve(3, tokens, CPU)
            assert start.dtype == end.dtype == torch.int32
            assert start.tolist() == [before] * 3 and end.tolist() == [before + tokens] * 3
            addresses.add((start.data_ptr(), end.data_ptr()))
            layer.advance(tokens)
    assert len(addresses) == 1
    twin = copy.deepcopy(cache)
    assert twin.layers[0].lengths is twin.layers[2].lengths is not layers[0].lengths


def test_a_stamp_tells_buffers_apart() -> None:
    """By it a CUDA graph knows the addresses it was captured with."""
    layer, stamps = filled(), []

    def has_new_stamp() -> bool:
        stamps.append(layer.stamp)
        return stamps[-1] not in stamps[:-1]

    assert has_new_stamp()
    append(layer, 1)
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([1, 0, 2]))
    assert not has_new_stamp()
    append(layer, 100)  # grows
    assert has_new_stamp()
    layer.batch_repeat_interleave(2)
    assert has_new_stamp()
    layer = copy.deepcopy(layer)
    assert has_new_stamp()


# --- what transformers does to a cache ----------------------------------------------------------


@pytest.mark.parametrize("count", [-2, torch.tensor(-2)])
def test_crop_goes_back(count: int) -> None:
    layer = filled(tokens=5)
    append(layer, 2, seed=1)
    layer.crop(count)
    assert same(stored(layer), stored(filled(tokens=5)))
    assert consistent(layer)
    append(layer, 1, seed=2)
    assert layer.get_seq_length() == 6


@pytest.mark.parametrize(("count", "left"), [(0, 5), (-5, 0), (-9, 0)])
def test_crop_limits(count: int, left: int) -> None:
    layer = filled(tokens=5)
    layer.crop(count)
    assert layer.get_seq_length() == left
    assert consistent(layer)


def test_crop_to_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="crop: got 3"):
        filled().crop(3)


def test_reorder() -> None:
    layer, order = filled(max_cache_len=8), torch.tensor([2, 0, 0])
    expected = [buffer[order] for buffer in stored(layer)]
    addresses = [buffer.data_ptr() for buffer in layer.buffers]
    layer.reorder_cache(order)
    assert same(stored(layer), expected)
    assert addresses == [buffer.data_ptr() for buffer in layer.buffers]


def test_reorder_to_another_number_of_beams() -> None:
    layer, order = filled(), torch.tensor([2, 1])
    expected = [buffer[order] for buffer in stored(layer)]
    layer.reorder_cache(order)
    assert same(stored(layer), expected)
    assert consistent(layer)


def test_repeat_interleave() -> None:
    layer = filled()
    expected = [buffer.repeat_interleave(2, dim=0) for buffer in stored(layer)]
    layer.batch_repeat_interleave(2)
    assert same(stored(layer), expected)
    assert layer.batch_size == 6
    assert consistent(layer)
    append(layer, 1, batch=6, seed=1)


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_select(rows: Tensor) -> None:
    layer = filled()
    expected = [buffer[rows] for buffer in stored(layer)]
    layer.batch_select_indices(rows)
    assert same(stored(layer), expected)
    assert layer.batch_size == 2
    assert consistent(layer)


def test_an_empty_layer_survives_every_operation() -> None:
    layer = QuantizedLayer(SPEC)
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.prefetch()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not hasattr(layer, "batch_size")  # how Cache.batch_size knows that it is unknown


def test_copies_are_apart() -> None:
    layer = filled()
    twin, before = copy.deepcopy(layer), stored(layer)
    append(twin, 1, seed=1)
    twin.reorder_cache(torch.tensor([1, 1, 1]))
    assert same(stored(layer), before)
    assert (layer.length, twin.length) == (5, 6)


@torch.inference_mode()
def test_text_begun_in_inference_mode() -> None:
    layer = filled()
    layer.batch_repeat_interleave(2)
    with torch.inference_mode(False):
        append(layer, 100, batch=6, seed=1)
        layer.crop(-1)
        layer.reorder_cache(torch.tensor([1, 0, 2, 3, 4, 5]))
    assert consistent(layer)


@pytest.mark.parametrize(("max_cache_len", "keys", "longest"), [(None, 7, -1), (8, 8, 8)])
def test_sizes_for_masks(max_cache_len: int | None, keys: int, longest: int) -> None:
    layer = filled(max_cache_len=max_cache_len)
    assert layer.get_mask_sizes(2) == (keys, 0)
    assert layer.get_max_length() == longest


def test_what_cannot_work_raises() -> None:
    layer = filled()
    with pytest.raises(RuntimeError, match=r"update\(\) was called on a quantized cache"):
        layer.update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(RuntimeError, match="cannot be offloaded"):
        layer.offload()


# --- adoption -----------------------------------------------------------------------------------


def llama_config():
    from helpers import tiny_model

    return tiny_model().config


@pytest.mark.parametrize("with_config", [False, True])
def test_adopts_a_dynamic_cache(with_config: bool) -> None:
    cache = DynamicCache(config=llama_config()) if with_config else DynamicCache()
    first = adopt(cache, 0, SPEC)
    second = adopt(cache, 1, SPEC)
    assert [type(layer) for layer in cache.layers] == [QuantizedLayer, QuantizedLayer]
    assert first.max_cache_len is None
    assert adopt(cache, 0, SPEC) is first is cache.layers[0] is not second
    append(first, 4)
    assert cache.get_seq_length() == 4
    assert cache.get_mask_sizes(1, 0) == (5, 0)
    append(second, 4)
    assert cache.batch_size == 3
    assert cache.is_croppable and not cache.is_compileable and cache.is_sliding == [False, False]
    cache.crop(-1)
    assert (first.length, second.length) == (3, 3)


def test_adopts_a_static_cache_with_its_capacity() -> None:
    cache = StaticCache(llama_config(), max_cache_len=12)
    layer = adopt(cache, 1, SPEC)
    assert layer.max_cache_len == 12
    assert [type(layer) for layer in cache.layers] == [StaticLayer, QuantizedLayer]
    assert cache.get_max_length() == 12


def test_adopts_a_static_layer_that_was_reset() -> None:
    cache = StaticCache(llama_config(), max_cache_len=12)
    keys = torch.zeros(1, 2, 3, 16)
    cache.update(keys, keys, 0)
    cache.reset()
    assert adopt(cache, 0, SPEC).get_seq_length() == 0


def test_refuses_a_cache_with_text_of_another_model() -> None:
    cache, keys = DynamicCache(), torch.zeros(1, 2, 3, 16)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="layer 0 holds unquantized keys"):
        adopt(cache, 0, SPEC)
    other = DynamicCache()
    adopt(other, 0, SPEC)
    with pytest.raises(ValueError, match="filled by another model.*bits=4.*bits=8"):
        adopt(other, 0, CacheSpec(8, 2, 32))


def test_refuses_other_caches() -> None:
    with pytest.raises(TypeError, match="past_key_values: got tuple"):
        adopt(((), ()), 0, SPEC)
    sliding = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=8)])
    with pytest.raises(TypeError, match="layer 0 is a DynamicSlidingWindowLayer"):
        adopt(sliding, 0, SPEC)
    with pytest.raises(ValueError, match="got 1 layers, needs one for layer 1"):
        adopt(Cache(layers=[DynamicLayer()]), 1, SPEC)
    offloading = Cache(layers=[DynamicLayer()])
    offloading.offloading = True
    with pytest.raises(ValueError, match="offloading cache"):
        adopt(offloading, 0, SPEC)
