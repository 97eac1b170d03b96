"""The quantized KV cache: a transformers cache layer that holds int4 or int8 keys and values.

Nobody builds one by hand: a decoder layer calls `adopt`, which replaces the EMPTY layer of
whatever cache `generate` or a caller made (growing for `DynamicCache`, of fixed capacity for
`StaticCache`). The kernels append to its buffers and attend to them; `update`, transformers' way
to do both, raises.

Layout (CONTRIBUTING.md), D = head_dim, one scale and zero a token and head:
    codes uint8 [batch, kv_heads, capacity, D * bits / 8]
    scale fp16, zero uint8 [batch, kv_heads, capacity]
The length is the same for every row (padding is the mask's business). A layer keeps it as a Python
int, so that capacity is checked without asking the device; the kernels read it from tensors that
the layers of a cache share (`Lengths`).

Over 300 lines: a good half is what transformers asks of a cache layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from quarot.ops import reference

_STEP = 64
"""Tokens that a growing cache's capacity is a multiple of."""
_GROWTH = 256
"""Fewest tokens that a cache grows by: growing copies it, and a CUDA graph is captured anew."""

_HEAD_DIM_MULTIPLE = 8
_MAX_HEAD_DIM = 256
"""What the kernels take: kHeadDimMultiple and kMaxHeadDim of csrc/kernels/kv_cache.h."""

_BUFFERS = ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a layer of the cache stores.

    Args:
        bits: 4, 8, or 16 = transformers' own layer, which takes any head_dim.
        kv_heads, head_dim: geometry of the keys and values.

    Raises:
        ValueError: the kernels cannot store such heads.
    """

    bits: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        fits = self.head_dim % _HEAD_DIM_MULTIPLE == 0 and self.head_dim <= _MAX_HEAD_DIM
        if self.bits < 16 and not fits:
            raise ValueError(
                f"head_dim: got {self.head_dim}, a {self.bits}-bit KV cache needs a multiple of "
                f"{_HEAD_DIM_MULTIPLE}, at most {_MAX_HEAD_DIM} (KV16 takes any)"
            )


class Lengths:
    """The length before and after the tokens being appended, on the device.

    The layers of a cache share one: the first layer of a step fills it, the others find it filled,
    so that counting is one kernel a step and not one a layer. Its addresses stay while batch and
    device do: a CUDA graph reads them.
    """

    recording = False
    """Whether a CUDA graph is being captured, which will run at other lengths than the host's."""

    def __init__(self) -> None:
        self.start = self.end = torch.empty(0, dtype=torch.int32)
        self._pair = self.start[None]
        self._held: tuple[int, int] | None = None  # what the device holds, or will in stream order

    def at(self, start: int, end: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return int32 [batch] tensors that are `start` and `end` everywhere."""
        if self.start.shape[0] != batch or self.start.device != device:
            with torch.inference_mode(False):  # text may go on outside of inference mode
                self._pair = torch.empty(2, batch, dtype=torch.int32, device=device)
                self.start, self.end = self._pair.unbind()
            self._held = None
        held = self._held
        if held != (start, end):
            self._held = None  # in case of an interrupt
            if held is not None and start - held[0] == end - held[1]:
                self._pair.add_(start - held[0])
            else:
                self.start.fill_(start)
                self.end.fill_(end)
            self._held = start, end
        return self.start, self.end


class QuantizedLayer(CacheLayerMixin):
    """Hold the quantized keys and values of one decoder layer.

    Args:
        spec: what a token's entry looks like.
        lengths: those of the cache's other layers, or None for the first.
        max_cache_len: fixed capacity in tokens, or None to grow with the text: by half of the
            capacity and 256 tokens at least, so that appending costs a constant time on average.
    """

    is_compileable = False  # the host-side length changes with every token
    is_croppable = True
    is_sliding = False
    supports_early_init = False  # buffers follow from the spec, not from transformers' fake keys

    k_codes: Tensor
    k_scale: Tensor
    k_zero: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_zero: Tensor
    batch_size: int

    def __init__(
        self, spec: CacheSpec, max_cache_len: int | None = None, lengths: Lengths | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.lengths = lengths or Lengths()
        self.stamp = object()  # another one whenever the buffers are; copies get their own
        self.max_cache_len = max_cache_len
        self.length = 0
        self.capacity = 0

    def __repr__(self) -> str:
        spec = self.spec
        limit = "growing" if self.max_cache_len is None else f"max {self.max_cache_len}"
        return f"QuantizedLayer({spec.bits}-bit, {self.length}/{self.capacity} tokens, {limit})"

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """k_codes, k_scale, k_zero, v_codes, v_scale, v_zero: the order of the ops' arguments."""
        return tuple(getattr(self, name) for name in _BUFFERS)

    @property
    def known_length(self) -> int | None:
        """The length, where the host may tell it to a kernel: not in a CUDA graph."""
        return None if self.lengths.recording else self.length

    def reserve(self, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Make room for `tokens` more tokens of each of `batch` rows.

        Returns:
            The lengths before and after them, int32 [batch], until another layer appends.

        Raises:
            ValueError: the capacity is fixed and too small, or the cache holds text of another
                batch size or device.
        """
        if self.length and (batch != self.batch_size or device != self.k_codes.device):
            raise ValueError(
                f"past_key_values: holds {self.length} tokens of batch {self.batch_size} on "
                f"{self.k_codes.device}, got batch {batch} on {device}; needs the same"
            )
        needed = self.length + tokens
        if self.max_cache_len is not None and needed > self.max_cache_len:
            raise ValueError(
                f"past_key_values: {self.length} tokens are stored and {tokens} more came, which "
                f"needs a capacity of {needed}; this static cache holds max_cache_len = "
                f"{self.max_cache_len}"
            )
        fits = self.is_initialized and batch == self.batch_size and device == self.k_codes.device
        if not fits or needed > self.capacity:
            self._allocate(batch, self._next_capacity(needed), device)
        return self.lengths.at(self.length, needed, batch, device)

    def advance(self, tokens: int) -> None:
        """Count `tokens` tokens that were appended to the buffers."""
        self.length += tokens

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and the values stored, each [batch, kv_heads, length, head_dim]."""
        keys, values = (
            reference.dequantize_kv(codes, scale, zero, self.length, self.spec.bits).to(dtype)
            for codes, scale, zero in (self.buffers[:3], self.buffers[3:])
        )
        return keys, values

    def _next_capacity(self, needed: int) -> int:
        if self.max_cache_len is not None:
            return self.max_cache_len
        more = max(self.capacity // 2, _GROWTH)
        grown = max(needed, self.capacity + more) if self.length else needed
        return -(-grown // _STEP) * _STEP

    def _allocate(self, batch: int, capacity: int, device: torch.device) -> None:
        """Replace the buffers by zeros of `capacity` tokens, keeping the tokens stored."""
        spec = self.spec
        rows = (batch, spec.kv_heads, capacity)
        codes = (*rows, spec.head_dim * spec.bits // 8)
        for name in _BUFFERS:
            shape = codes if name.endswith("codes") else rows
            dtype = torch.float16 if name.endswith("scale") else torch.uint8
            with torch.inference_mode(False):  # text may go on outside of inference mode
                new = torch.zeros(shape, dtype=dtype, device=device)
            if self.length:
                new[:, :, : self.length] = getattr(self, name)[:, :, : self.length]
            setattr(self, name, new)
        self.batch_size, self.capacity, self.is_initialized = batch, capacity, True
        self.stamp = object()

    # --- what transformers asks of a cache layer ------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys [batch, kv_heads, tokens, head_dim]; decoder layers use `reserve`."""
        if not self.is_initialized:
            self.reserve(key_states.shape[0], key_states.shape[2], key_states.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuse: only quarot's decoder layers append, quantized."""
        raise RuntimeError(
            "past_key_values: update() was called on a quantized cache layer, whose keys and "
            "values only quarot's decoder layers append; another model needs a cache of its own"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys a mask must cover, offset of the first)."""
        return self.max_cache_len or self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens stored."""
        return self.length

    def get_max_length(self) -> int:
        """Return the fixed capacity, or -1 when the cache grows."""
        return self.max_cache_len or -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.17

    def reset(self) -> None:
        """Forget the text; a static cache keeps its buffers (and their addresses)."""
        self.length = 0
        if self.is_initialized and self.max_cache_len is None:
            for name in (*_BUFFERS, "batch_size"):
                delattr(self, name)
            self.capacity, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the count is given as a negative number (or a 0-d tensor)."""
        count = int(tokens_to_remove)
        if count > 0:
            raise ValueError(
                f"crop: got {count}, needs the number of tokens to remove as a negative number"
            )
        self.length = max(self.length + count, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i the old row beam_idx[i]: only the tokens stored are copied, in place."""
        if not self.length:
            return
        if beam_idx.numel() != self.batch_size:
            self.batch_select_indices(beam_idx)
            return
        index = beam_idx.to(self.k_codes.device)
        for buffer in self.buffers:
            stored = buffer[:, :, : self.length]
            stored.copy_(stored.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, the copies side by side."""
        if self.length:
            rows = torch.arange(self.batch_size, device=self.k_codes.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a bool mask) of the batch."""
        if not self.length:
            return
        with torch.inference_mode(False):
            for name in _BUFFERS:
                buffer = getattr(self, name)
                setattr(self, name, buffer[indices.to(buffer.device)])
        self.batch_size = self.k_codes.shape[0]
        self.stamp = object()

    def offload(self) -> None:
        """Refuse: a quantized cache stays on its device."""
        raise RuntimeError("past_key_values: a quantized cache cannot be offloaded to the CPU")

    def prefetch(self) -> None:
        """Do nothing: the layer is always on its device."""


def adopt(cache: Cache, index: int, spec: CacheSpec) -> QuantizedLayer:
    """Return layer `index` of `cache` as a quantized layer, replacing it if it is still empty.

    Raises:
        TypeError: `cache` is not a transformers Cache, or its layer is of a kind that has no
            quantized form (sliding windows, linear attention …).
        ValueError: the layer already holds unquantized keys, holds another spec, or offloads.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values: got {type(cache).__name__}, needs a transformers Cache or None"
        )
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= index:
        raise ValueError(
            f"past_key_values: got {len(cache.layers)} layers, needs one for layer {index} too"
        )
    layer = cache.layers[index]
    if isinstance(layer, QuantizedLayer):
        if layer.spec != spec:
            raise ValueError(
                f"past_key_values: layer {index} was filled by another model: holds {layer.spec}, "
                f"needs {spec}"
            )
        return layer
    if type(layer) not in (DynamicLayer, StaticLayer):
        raise TypeError(
            f"past_key_values: layer {index} is a {type(layer).__name__}, needs a DynamicLayer or "
            "StaticLayer (a plain DynamicCache or StaticCache)"
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "past_key_values: got an offloading cache, needs one that stays on its device"
        )
    if layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"past_key_values: layer {index} holds unquantized keys of another model; needs an "
            "empty cache or one that this model filled"
        )
    capacity = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    ours = (other.lengths for other in cache.layers if isinstance(other, QuantizedLayer))
    adopted = QuantizedLayer(spec, capacity, next(ours, None))
    cache.layers[index] = adopted
    return adopted
