"""What each op needs of its arguments: the checks of `reference`, the same as the kernels'.

Without the limits of a kernel's layout. All raise RuntimeError naming the argument, what it needs
and what it got; `name` is the argument's name in the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_K_MULTIPLE = 32  # columns of a linear's weights
_PAGE_MULTIPLE = 16  # tokens of a paged cache's block


def require(condition: bool, needs: str, got: Any) -> None:
    """Raise RuntimeError "<needs>; got <got>" unless the condition holds."""
    if condition:
        return
    if isinstance(got, Tensor):
        got = f"{_text(got.dtype)} {list(got.shape)} on {got.device}"
    raise RuntimeError(f"{needs}; got {got}")


def tensor(name: str, x: Tensor, dtype: torch.dtype, shape: Sequence[int] | None = None) -> None:
    """Check a dtype, and a shape where one is given."""
    require(isinstance(x, Tensor), f"{name} must be a tensor", type(x).__name__)
    require(x.dtype == dtype, f"{name} must be {_text(dtype)}", x)
    if shape is not None:
        require(x.shape == tuple(shape), f"{name} must have shape {list(shape)}", x)


def floating(name: str, x: Tensor, dims: int = 1, *, wide: bool = False) -> None:
    """Check a float tensor of at least `dims` dimensions; `wide`: float64 is one too."""
    require(isinstance(x, Tensor), f"{name} must be a tensor", type(x).__name__)
    allowed = x.dtype in _FLOATS or (wide and x.dtype == torch.float64)
    require(allowed, f"{name} must be float32, float16 or bfloat16", x)
    require(x.ndim >= dims, f"{name} must have at least {dims} dimension(s)", x)


def float_dtype(name: str, dtype: torch.dtype) -> None:
    """Check the dtype of a result."""
    require(dtype in _FLOATS, f"{name} must be float32, float16 or bfloat16", _text(dtype))


def quantizer(bits: int, clip: float, group: int, packed: bool, n: int) -> None:
    """Check the options of a quantizer of rows of n."""
    require(bits in (4, 8, 16), "bits must be 4, 8 or 16", bits)
    require(0 < clip <= 1, "clip must be in (0, 1]", clip)
    if bits == 16:  # nothing is quantized
        require(group == 0 and not packed, "group and packed need bits = 4 or 8", "bits = 16")
        return
    divides = group == 0 or (group > 0 and n % group == 0)
    require(divides, f"group must be 0 or divide {n}, the columns of a row", group)
    possible = not packed or (bits == 4 and n % 2 == 0)
    needs = "packed needs bits = 4 and an even number of columns"
    require(possible, needs, f"bits = {bits} and {n} columns")


def transform(name: str, size: int | None, factor: Tensor | None, n: int) -> None:
    """Check a transform of n positions; whether a factor of that size exists, `hadamard` says."""
    if size is not None:
        divides = size >= 1 and n % size == 0
        require(divides, f"{name} must divide {n}, the transformed dimension", size)
    if factor is not None:
        tensor("factor", factor, torch.int8)
        square = factor.ndim == 2 and factor.shape[0] == factor.shape[1]
        require(square, "factor must be a square matrix", factor)


def packed_weight(name: str, w: Tensor) -> None:
    """Check canonical weight codes, uint8 [n, k / 2]."""
    tensor(name, w, torch.uint8)
    require(w.ndim == 2, f"{name} must be [n, k / 2]", w)
    columns(name, 2 * w.shape[1])


def columns(name: str, k: int) -> None:
    """Check the width of a linear."""
    needs = f"{name} must have a multiple of {_K_MULTIPLE} input channels"
    require(k > 0 and k % _K_MULTIPLE == 0, needs, k)


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Check the arguments of `linear_int4`; x_q and w may be packed or not."""
    codes = x_q.dtype in (torch.int8, torch.uint8)
    require(codes and x_q.ndim >= 1, "x_q must be int8 [..., k], or uint8 where it is packed", x_q)
    rows, k = x_q.shape[:-1], x_q.shape[-1] * (2 if x_q.dtype == torch.uint8 else 1)
    columns("x_q", k)
    matrix = w_scale.ndim == 2 and w_scale.numel() > 0
    require(matrix, "w_scale must be [n, groups]", w_scale)
    n, groups = w_scale.shape
    require(k % groups == 0, f"w_scale: the groups must divide k = {k}", w_scale)
    tensor("x_scale", x_scale, torch.float32, rows)
    tensor("w", w, torch.uint8, (n, k // 2))
    tensor("w_scale", w_scale, torch.float32)
    if x_zero is not None:
        tensor("x_zero", x_zero, torch.int32, rows)
        if w_sum is None:
            raise RuntimeError("w_sum must be int32 [n, groups] where x_zero is given; got None")
        tensor("w_sum", w_sum, torch.int32, (n, groups))
    for name, addend, shape in (("bias", bias, (n,)), ("residual", residual, (*rows, n))):
        if addend is not None:
            floating(name, addend)
            tensor(name, addend, addend.dtype, shape)
    float_dtype("out_dtype", out_dtype)


def cache(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    bits: int,
    block_table: Tensor | None = None,
) -> None:
    """Check queries [batch, seq, heads, head_dim] and the quantized cache that they belong to."""
    require(bits in (4, 8), "bits must be 4 or 8", bits)
    floating("q", q)
    require(q.ndim == 4, "q must be [batch, seq, heads, head_dim]", q)
    batch, dim = q.shape[0], q.shape[3]
    tensor("k_codes", k_codes, torch.uint8)
    belongs = k_codes.ndim == 4 and (block_table is not None or k_codes.shape[0] == batch)
    belongs = belongs and k_codes.shape[3] * 8 == dim * bits
    needs = f"k_codes must belong to {batch} sequence(s) and head_dim {dim}, as q does, at {bits}"
    require(belongs, f"{needs} bits", k_codes)
    slots = k_codes.shape[:3]
    for name, part, dtype, shape in (
        ("k_codes", k_codes, torch.uint8, k_codes.shape),
        ("k_scale", k_scale, torch.float16, slots),
        ("k_zero", k_zero, torch.uint8, slots),
        ("v_codes", v_codes, torch.uint8, k_codes.shape),
        ("v_scale", v_scale, torch.float16, slots),
        ("v_zero", v_zero, torch.uint8, slots),
    ):
        tensor(name, part, dtype, shape)
        require(part.is_contiguous(), f"{name} must be contiguous", part)
    if block_table is not None:
        tensor("block_table", block_table, torch.int32)
        table = block_table.ndim == 2 and block_table.shape[0] == batch
        require(table, f"block_table must be [{batch}, blocks of a sequence]", block_table)
        size = k_codes.shape[2]
        needs = f"k_codes: blocks must be of a multiple of {_PAGE_MULTIPLE} tokens"
        require(size > 0 and size % _PAGE_MULTIPLE == 0, needs, k_codes)


def blocks(block_table: Tensor, codes: Tensor, begin: Tensor, end: Tensor) -> None:
    """Check that a paged cache has the blocks that hold tokens [begin, end) of each row."""
    held, size = codes.shape[0], codes.shape[2]
    rows = zip(block_table.tolist(), begin.tolist(), end.tolist(), strict=True)
    for b, (row, first, past) in enumerate(rows):
        if first >= past:
            continue
        for i, block in enumerate(row[: -(-past // size)]):
            needs = f"block_table[{b}, {i}] must be a block between 0 and {held - 1}"
            require(i < first // size or 0 <= block < held, needs, block)


def appended(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, start: Tensor
) -> None:
    """Check what is appended to a cache of `kv_heads` heads, beside the cache itself."""
    batch, tokens, _, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        tensor(name, x, q.dtype, (batch, tokens, kv_heads, dim))
    floating("cos", cos)
    fits = cos.ndim == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == tokens
    fits = fits and cos.shape[2] % 2 == 0 and cos.shape[2] <= dim
    require(fits, f"cos must be [1 or {batch}, {tokens}, an even number up to {dim}]", cos)
    tensor("sin", sin, cos.dtype, cos.shape)
    tensor("start", start, torch.int32, (batch,))


def visible(
    q: Tensor,
    kv_heads: int,
    capacity: int,
    lengths: Tensor,
    mask: Tensor | None,
    length: int | None,
) -> int:
    """Check what attention may see; return the largest length (0 without any)."""
    batch, queries, heads, _ = q.shape
    divides = kv_heads > 0 and heads % kv_heads == 0
    require(divides, f"q must have a multiple of the cache's {kv_heads} heads", q)
    tensor("lengths", lengths, torch.int32, (batch,))
    if length is not None:
        needs = f"length must be between 0 and the capacity {capacity}"
        require(0 <= length <= capacity, needs, length)
    held = lengths.tolist()
    for b, each in enumerate(held):
        needs = f"lengths[{b}] must be between 0 and the capacity {capacity}"
        require(0 <= each <= capacity, needs, each)
        same = f"length must be that of all sequences, lengths[{b}] = {each}"
        require(length in (None, each), same, length)
    longest = max(held, default=0)
    if mask is not None:
        tensor("mask", mask, torch.bool)
        fits = mask.ndim == 4 and mask.shape[0] == batch and mask.shape[1] in (1, heads)
        fits = fits and mask.shape[2] == queries and mask.shape[3] >= longest
        needs = f"mask must be [{batch}, 1 or {heads}, {queries}, at least {longest}]"
        require(fits, needs, mask)
    return longest


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
