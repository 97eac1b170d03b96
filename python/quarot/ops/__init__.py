"""quarot's kernels as torch ops: typed wrappers over `torch.ops.quarot.*`, on CPU and CUDA.

Importing this module loads the compiled library `quarot._C`. The wrappers fill in what follows from
the shapes (Hadamard factor and scale) and refuse tensors that require grad; the library checks
everything else. An op without a kernel for a device runs its reference there (`reference.py`, the
executable specification), noted once in the log of "quarot"; `kernels()` lists which.

Words used throughout: a *row* is the last dimension; *codes* are signed int4 or int8; x is about
scale * (code - zero). Packed int4 is uint8 [..., n/2] with the even index in the low nibble.
`group` columns share a scale (0: the whole row). float means float32, bfloat16 or float16. All
ops compute in float32, and round nothing to 16 bits between the steps of a fused op.

Every function raises RuntimeError naming the argument, what it got and what it needs (ValueError
for a size without a Hadamard matrix). Above 300 lines: half of them say what the ops do.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from quarot import hadamard as _hadamard
from quarot.ops import library, reference
from quarot.ops.reference import Quantized

__all__ = [
    "attention",
    "clip_search",
    "dequantize",
    "glu_hadamard_quantize",
    "hadamard",
    "hadamard_quantize",
    "head_hadamard_quantize",
    "kernels",
    "linear_int4",
    "pack_int4",
    "prepack_int4",
    "quantize",
    "rmsnorm_quantize",
    "rope_hadamard_kv_append",
    "unpack_int4",
    "unprepack_int4",
]

# What a call costs the host: the overload itself needs no search for it, and a dtype's code
# (c10::ScalarType) none for __torch_function__, which torch seeks in a torch.dtype at each call.
_linear_int4 = torch.ops.quarot.linear_int4.default
_DTYPE_CODES: dict[torch.dtype, Any] = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def hadamard(
    x: Tensor,
    size: int | None = None,
    *,
    factor: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multiply each block of `size` entries of a row by a Hadamard matrix: scale * x @ H.

    Args:
        x: float [..., n].
        size: block length, a divisor of n of the form K * 2^p; None = the largest, 1 = none.
        factor: int8 [K, K] of +-1 in place of `quarot.hadamard.factor_matrix(K)`.
        scale: None = 1 / sqrt(size), which makes the transform orthonormal.

    Returns:
        Tensor of x's shape and dtype. QuaRot (arXiv 2404.00456), section 3.
    """
    _no_grad("hadamard", x)
    size, factor, scale = _fill(x, size, factor, scale)
    return torch.ops.quarot.hadamard(x, size, factor, scale)


def quantize(
    x: Tensor,
    bits: int = 4,
    *,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
    packed: bool = False,
) -> Quantized:
    """Quantize rows, or groups of a row, to 4 or 8 bits.

    Args:
        x: float [..., n].
        bits: 4 or 8; 16 returns (x, None, None), in all quantizing ops; group and packed need 4
            or 8, clip has no effect at 16.
        symmetric: around zero; else with a zero point (both signed).
        clip: share of max|x| (of the range, when asymmetric) that is kept, in (0, 1].
        group: columns that share a scale, a divisor of n; 0 = the whole row.
        packed: 4-bit codes as uint8 [..., n/2] instead of int8 [..., n].

    Returns:
        (codes, scale float32 [...] or [..., n / group], zero int32 like scale, or None). A row with
        a NaN or an infinity has scale NaN and codes 0.
    """
    _no_grad("quantize", x)
    if bits == 16:
        return reference.quantize(x, bits, clip=clip, group=group, packed=packed)
    return torch.ops.quarot.quantize(x, bits, symmetric, clip, group, packed)


def dequantize(
    q: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return scale * (code - zero) as `dtype` [..., n]; the arguments are `quantize`'s result."""
    return torch.ops.quarot.dequantize(q, scale, zero, dtype)


def pack_int4(q: Tensor) -> Tensor:
    """Pack int8 [..., n] with values in [-8, 7] into uint8 [..., n/2]; n even."""
    return torch.ops.quarot.pack_int4(q)


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack uint8 [..., n/2] into int8 [..., n]: the inverse of `pack_int4`."""
    return torch.ops.quarot.unpack_int4(packed)


def clip_search(
    w: Tensor, norm: float = 2.4, group: int = 0, importance: Tensor | None = None
) -> Tensor:
    """Choose the scales of int4 weights that make the rounding error smallest.

    A row (or group) gets the scale p * max|w| / 7 with p, among 1.00, 0.99 … 0.21, of the least
    error sum importance * |scale * code - w|^norm, the first of equals. Sums differ by their order
    between devices, so that of two trials almost equal either may be chosen. QuaRot (arXiv
    2404.00456), section 5: RTN with clip search.

    Args:
        w: float [rows, n], n ≥ 1.
        norm: exponent of the error, above 0.
        group: columns that share a scale, a divisor of n; 0 = the whole row.
        importance: float32 [n] ≥ 0, weight of each column's error; None = equal.

    Returns:
        float32 [rows, n / group] (one column when group is 0), above 0; 1 for a group of zeros, NaN
        for one with a NaN or an infinity.
    """
    _no_grad("clip_search", w, importance)
    return torch.ops.quarot.clip_search(w, norm, group, importance)


def hadamard_quantize(
    x: Tensor,
    size: int | None = None,
    *,
    factor: Tensor | None = None,
    scale_hadamard: float | None = None,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
    packed: bool = False,
) -> Quantized:
    """Transform as `hadamard` does and quantize as `quantize` does, in one pass."""
    _no_grad("hadamard_quantize", x)
    size, factor, scale = _fill(x, size, factor, scale_hadamard)
    if bits == 16:
        return reference.hadamard_quantize(
            x, size, factor=factor, scale_hadamard=scale,
            bits=bits, clip=clip, group=group, packed=packed,
        )  # fmt: skip
    return torch.ops.quarot.hadamard_quantize(
        x, size, factor, scale, bits, symmetric, clip, group, packed
    )


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
    packed: bool = False,
) -> Quantized:
    """Normalise rows by their root mean square and quantize them, in one pass.

    Args:
        x: float [..., n];  weight: float [n], or None = all ones;  eps: added to the mean square.

    The other arguments and the result are `quantize`'s.
    """
    _no_grad("rmsnorm_quantize", x, weight)
    if bits == 16:
        return reference.rmsnorm_quantize(
            x, weight, eps, bits=bits, clip=clip, group=group, packed=packed
        )
    return torch.ops.quarot.rmsnorm_quantize(x, weight, eps, bits, symmetric, clip, group, packed)


def glu_hadamard_quantize(
    gate_up: Tensor,
    activation: str = "silu",
    size: int | None = 1,
    *,
    factor: Tensor | None = None,
    scale_hadamard: float | None = None,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
    packed: bool = False,
) -> Quantized:
    """Compute activation(gate) * up, transform and quantize it, in one pass.

    Args:
        gate_up: float [..., 2 n], the n gate columns first.
        activation: "silu", "gelu" (exact) or "gelu_tanh".

    The other arguments are `hadamard`'s and `quantize`'s, on rows of n.
    """
    _no_grad("glu_hadamard_quantize", gate_up)
    size, factor, scale = _fill(gate_up, size, factor, scale_hadamard, parts=2)
    if bits == 16:
        return reference.glu_hadamard_quantize(
            gate_up, activation, size, factor=factor, scale_hadamard=scale,
            bits=bits, clip=clip, group=group, packed=packed,
        )  # fmt: skip
    return torch.ops.quarot.glu_hadamard_quantize(
        gate_up, activation, size, factor, scale, bits, symmetric, clip, group, packed
    )


def head_hadamard_quantize(
    x: Tensor,
    heads: int | None = 1,
    *,
    factor: Tensor | None = None,
    scale_hadamard: float | None = None,
    bits: int = 4,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
    packed: bool = False,
) -> Quantized:
    """Transform across the heads, H_heads (x) I, and quantize each token, in one pass.

    Args:
        x: float [..., H, D], the output of attention.
        heads: heads that are transformed together, a divisor of H of the form K * 2^p; None = the
            largest, 1 = no transform.

    Returns:
        `quantize`'s result for rows of H * D: codes [..., H * D]. QuaRot, section 4.
    """
    _no_grad("head_hadamard_quantize", x)
    heads, factor, scale = _fill(x, heads, factor, scale_hadamard, dim=-2)
    if bits == 16:
        return reference.head_hadamard_quantize(
            x, heads, factor=factor, scale_hadamard=scale,
            bits=bits, clip=clip, group=group, packed=packed,
        )  # fmt: skip
    return torch.ops.quarot.head_hadamard_quantize(
        x, heads, factor, scale, bits, symmetric, clip, group, packed
    )


def linear_int4(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply quantized activations by int4 weights: x @ w.T (+ bias) (+ residual).

    Args:
        x_q: int8 [..., k] with int4 or int8 codes; packed uint8 [..., k/2] only on GPUs with int4
            tensor cores (sm_80 to sm_89). k is a multiple of 32.
        x_scale, x_zero: float32 and int32 [...], one a row; x_zero None = symmetric.
        w: `prepack_int4` of packed codes [n, k/2].
        w_scale: float32 [n, groups], k / groups columns each.
        w_sum: int32 [n, groups], the sums of the weight codes; needed with x_zero.
        bias: float [n];  residual: float [..., n];  out_dtype: a float dtype.

    Returns:
        `out_dtype` [..., n]: ((acc * x_scale) * w_scale) + bias + residual in float32 with acc
        exact in int32, one rounding.
    """
    _no_grad("linear_int4", bias, residual)
    code = _DTYPE_CODES.get(out_dtype, out_dtype)
    return _linear_int4(x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual, code)


def prepack_int4(w_packed: Tensor) -> Tensor:
    """Convert packed weight codes, uint8 [n, k/2], to the layout of this device's kernel."""
    return torch.ops.quarot.prepack_int4(w_packed)


def unprepack_int4(w: Tensor, n: int, k: int) -> Tensor:
    """Return the packed codes, uint8 [n, k/2], that `prepack_int4` was given."""
    return torch.ops.quarot.unprepack_int4(w, n, k)


def rope_hadamard_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    start: Tensor,
    *,
    bits: int,
    size: int | None = 1,
    factor: Tensor | None = None,
    k_clip: float = 0.95,
    v_clip: float = 0.95,
    block_table: Tensor | None = None,
) -> Tensor:
    """Apply RoPE and R3 to q and k, append k and v to the quantized cache in place, return q.

    Args:
        q: float [B, S, H, D];  k, v: the same with Hkv heads; the last dimension contiguous.
        cos, sin: float [B or 1, S, R]: R <= D rotary entries, rotate_half convention.
        k_codes, v_codes: uint8 [B, Hkv, capacity, D * bits / 8], written.
        k_scale, v_scale: float16 [B, Hkv, capacity], written;  k_zero, v_zero: the same, uint8.
        start: int32 [B] on the device: the first position written. start + S <= capacity.
        bits: 4 or 8, asymmetric, one scale a token and head.
        size: Hadamard block over the head dimension (R3), orthonormal; 1 = none.
        k_clip, v_clip: clip ratios.
        block_table: int32 [B, columns] on the device; the cache is then paged: B is the number of
            blocks in the shapes above, the capacity that of a block, a multiple of 16. Tokens
            i * capacity and on of row b stand in block block_table[b, i], up to the next i; entries
            that are not used may be anything. A block that does not exist is an error on a CPU; on
            CUDA its tokens are not written.

    Returns:
        The rotated q, [B, S, H, D] in its dtype.
    """
    _no_grad("rope_hadamard_kv_append", q, k, v)
    size, factor, _ = _fill(q, size, factor, None)
    return torch.ops.quarot.rope_hadamard_kv_append(
        q, k, v, cos, sin, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, start,
        bits, size, factor, k_clip, v_clip, block_table,
    )  # fmt: skip


def attention(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    lengths: Tensor,
    mask: Tensor | None = None,
    *,
    bits: int,
    scale: float,
    length: int | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attend causally to the quantized cache: softmax(scale * q k^T) v, softmax in float32.

    Args:
        q: float [B, S, H, D], the last S tokens of each row; H a multiple of Hkv.
        k_codes … v_zero: the cache, as `rope_hadamard_kv_append` has it.
        lengths: int32 [B] on the device: tokens in the cache, these S included. Query s sees the
            keys j <= lengths - S + s.
        mask: bool [B, 1 or H, S, L], true = may be seen; max(lengths) <= L <= capacity.
        bits: 4 or 8;  scale: factor of the scores.
        length: the length of all rows, where the host knows it; prefill on CUDA then needs no mask
            to see `lengths` with. It must equal every entry of `lengths`: checked on a CPU, taken
            as true on CUDA.
        window: keys that a query sees at most, its own the last: query s also needs
            j > lengths - S + s - window. None = all.
        block_table: as `rope_hadamard_kv_append` has it. A block that does not exist makes NaN of
            what sees it on CUDA.

    Returns:
        [B, S, H, D] in q's dtype; a query that sees nothing is 0.
    """
    _no_grad("attention", q)
    return torch.ops.quarot.attention(
        q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, lengths, mask,
        bits, scale, length, window, block_table,
    )  # fmt: skip


def kernels() -> dict[str, dict[str, str]]:
    """Return op -> device type -> "kernel" or "reference": what runs where in this build."""
    return {
        op: {
            device: "kernel" if library.has_kernel(op, device) else "reference"
            for device in library.DEVICES
        }
        for op in library.OPS
    }


def _no_grad(op: str, *tensors: Tensor | None) -> None:
    # What is no tensor is the library's to refuse.
    if not torch.is_grad_enabled():
        return
    for t in tensors:
        if getattr(t, "requires_grad", False):
            raise RuntimeError(
                f"{op}: got a tensor that requires grad, needs torch.no_grad() or "
                "inference_mode(): quarot's ops have no backward"
            )


def _fill(
    x: Any,
    size: int | None,
    factor: Tensor | None,
    scale: float | None,
    *,
    dim: int = -1,
    parts: int = 1,
) -> tuple[int, Tensor | None, float]:
    """Fill in the defaults of a transform of dimension `dim` of x, of one of its `parts`.

    Returns size, factor (None where size is a power of two) and scale.
    """
    if not isinstance(x, Tensor):  # the library's to refuse, as an x without that dimension is
        return size or 1, factor, 1.0
    if size is None:
        n = x.shape[dim] // parts if x.ndim >= -dim else 1
        size = _hadamard.split(n)[0] if n else 1
    if factor is None and size & (size - 1):
        factor = _factor(size, x.device)
    return size, factor, 1 / math.sqrt(max(size, 1)) if scale is None else scale


@torch.compiler.assume_constant_result
def _factor(size: int, device: torch.device) -> Tensor:
    return _factor_on(size, device)


@functools.lru_cache(maxsize=256)
def _factor_on(size: int, device: torch.device) -> Tensor:
    block, order, _ = _hadamard.split(max(size, 1))
    if block != size:
        raise ValueError(
            f"size: got {size}, needs K * 2^p with K one of {_hadamard.factor_orders()}"
        )
    with torch.inference_mode(False):
        return _hadamard.factor_matrix(order).to(device)
