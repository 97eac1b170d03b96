"""The ops in plain torch: the executable specification of quarot's arithmetic (CONTRIBUTING.md).

Every function has the name and the arguments of its wrapper in `quarot.ops`, runs on any device,
and works in float32 in the order that the kernels keep (Hadamard sums: in float64), so that a
kernel is compared with it bit by bit where no transform, norm or exponential comes before the
codes. It is also what `backend="reference"` and a device without a kernel run. Weights are
canonical here (packed [n, k/2]): `prepack_int4` is the identity. float64 inputs are taken, and keep
their precision, where nothing is quantized (bits=16). The arguments are checked as the kernels do
(`checks.py`), so a mistake is named on every device.

Two traps of eager torch are avoided throughout: dividing by a Python number multiplies by its
reciprocal on CUDA, so divisors are tensors; and integer matrix products do not exist there, so sums
of int codes are taken in float32, in slices short enough to be exact.

Above 300 lines: one specification, one function an op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quarot import hadamard as _hadamard
from quarot.ops import checks

Quantized = tuple[Tensor, Tensor | None, Tensor | None]
"""(codes, scale, zero): zero None when symmetric; scale None too when bits = 16."""

_SCALE_FLOOR = 2.0**-126  # smallest normal float32: below it 1 / scale may overflow
_KV_SCALE_RANGE = (2.0**-14, 65504.0)  # normal float16 numbers
_EXACT_K = 2**24 // (8 * 128)  # longest sum of int8 x int4 products that float32 holds exactly
_SCORES = 1 << 22  # attention scores held at once


def hadamard(
    x: Tensor,
    size: int | None = None,
    *,
    factor: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Blocks of `size` of the last dimension times H, one rounding."""
    checks.floating("x", x)
    checks.transform("size", size, factor, x.shape[-1])
    return _hadamard.transform(x.double(), size, scale, factor).to(x.dtype)


def quantize(
    x: Tensor,
    bits: int = 4,
    *,
    symmetric: bool = True,
    clip: float = 1.0,
    group: int = 0,
    packed: bool = False,
) -> Quantized:
    """Codes, scale and zero point per row, or per `group` columns of a row."""
    checks.floating("x", x, wide=bits == 16)
    checks.quantizer(bits, clip, group, packed, x.shape[-1])
    if bits == 16:
        return x, None, None
    rows = x.float().unflatten(-1, (-1, group)) if group else x.float()
    if x.shape[-1] == 0:
        low = high = rows.new_zeros((*rows.shape[:-1], 1))
    else:
        low, high = rows.aminmax(dim=-1, keepdim=True)
    finite = low.isfinite() & high.isfinite()
    ratio = torch.full_like(low, clip)
    shift = 2 ** (bits - 1)
    if symmetric:
        span, steps = ratio * torch.maximum(-low, high), shift - 1
    else:
        low, high = ratio * low.clamp(max=0), ratio * high.clamp(min=0)
        span, steps = high - low, 2**bits - 1
    scale = span / torch.full_like(span, steps)
    scale = torch.where(scale < _SCALE_FLOOR, 1.0, scale)
    inverse = scale.reciprocal()
    codes = (rows * inverse).round()
    zero = None
    if symmetric:
        codes = codes.clamp(-shift, shift - 1)
    else:  # unsigned codes, stored shifted into the signed range
        offset = (-low * inverse).round()
        codes = (codes + offset).clamp(0, steps) - shift
        zero = torch.where(finite, offset - shift, 0).squeeze(-1).int()
    codes = torch.where(finite, codes, 0).to(torch.int8).reshape(x.shape)
    scale = torch.where(finite, scale, torch.nan).squeeze(-1)
    return pack_int4(codes) if packed else codes, scale, zero


def dequantize(
    q: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scale * (code - zero), computed in float32."""
    codes = unpack_int4(q) if q.dtype == torch.uint8 else q
    checks.require(
        codes.dtype == torch.int8 and q.ndim >= 1, "q must be int8, or uint8 where packed", q
    )
    grouped = scale.ndim == codes.ndim
    n = codes.shape[-1]
    shape: tuple[int, ...] = codes.shape[:-1]
    if grouped:
        groups = scale.shape[-1]
        divides = n % groups == 0 if groups else n == 0
        checks.require(divides, f"scale's groups must divide the {n} columns of q", scale)
        shape = (*shape, groups)
    checks.tensor("scale", scale, torch.float32, shape)
    if zero is not None:
        checks.tensor("zero", zero, torch.int32, shape)
    checks.float_dtype("dtype", dtype)
    rows = codes.unflatten(-1, (scale.shape[-1], -1)) if grouped else codes
    values = rows.float() if zero is None else (rows - zero.unsqueeze(-1)).float()
    return (values * scale.unsqueeze(-1)).reshape(codes.shape).to(dtype)


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., n] in [-8, 7] -> uint8 [..., n/2]; the even index in the low nibble."""
    checks.tensor("q", q, torch.int8)
    even = q.ndim >= 1 and q.shape[-1] % 2 == 0
    checks.require(even, "q must have an even last dimension", q)
    low, high = q[..., 0::2].view(torch.uint8), q[..., 1::2].view(torch.uint8)
    return (low & 15) | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., n/2] -> int8 [..., n]: the inverse of `pack_int4`."""
    checks.tensor("packed", packed, torch.uint8)
    checks.require(packed.ndim >= 1, "packed must have at least 1 dimension(s)", packed)
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def clip_search(
    w: Tensor, norm: float = 2.4, group: int = 0, importance: Tensor | None = None
) -> Tensor:
    """Of the scales p * max|w| / 7, p = 1.00, 0.99 … 0.21, the first of least error."""
    checks.floating("w", w)
    matrix = w.ndim == 2 and w.shape[1] > 0
    checks.require(matrix, "w must be [rows, n] with at least one column", w)
    columns = w.shape[1]
    checks.require(norm > 0, "norm must be above 0", norm)
    divides = group == 0 or (group > 0 and columns % group == 0)
    checks.require(divides, f"group must be 0 or divide {columns}, the columns of w", group)
    rows = w.float().unflatten(-1, (-1, group or columns))
    mass = torch.ones((), device=w.device)
    if importance is not None:
        checks.tensor("importance", importance, torch.float32, (columns,))
        mass = importance.unflatten(-1, (-1, group or columns))
    amax = rows.abs().amax(-1)
    least = torch.full_like(amax, torch.inf)
    best = torch.full_like(amax, torch.nan)
    for percent in range(100, 20, -1):
        scale = percent / 100 * amax / torch.full_like(amax, 7)
        scale = torch.where(scale < _SCALE_FLOOR, 1.0, scale)
        steps = rows * scale.reciprocal().unsqueeze(-1)
        # In units of the scale, so that small weights do not underflow.
        error = (steps.round().clamp(-8, 7) - steps).abs() ** norm * mass
        total = error.sum(-1) * (percent / 100) ** norm
        best = torch.where(total < least, scale, best)
        least = torch.minimum(total, least)
    return torch.where(amax.isfinite(), best, torch.nan)


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
    """`hadamard`, then `quantize`, without a rounding in between."""
    y = _transform(_wide("x", x, bits), size, scale_hadamard, factor)
    return _finish(y, x.dtype, bits, symmetric, clip, group, packed)


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
    """x / sqrt(mean(x^2) + eps) * weight, then `quantize`."""
    y = _wide("x", x, bits)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        checks.floating("weight", weight, wide=bits == 16)
        checks.tensor("weight", weight, weight.dtype, x.shape[-1:])
        y = y * weight.to(y.dtype)
    return _finish(y, x.dtype, bits, symmetric, clip, group, packed)


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
    """activation(gate) * up, then `hadamard`, then `quantize`; gate_up is [..., gate | up]."""
    wide = _wide("gate_up", gate_up, bits)
    even = wide.shape[-1] % 2 == 0
    checks.require(even, "gate_up must have an even last dimension", gate_up)
    gate, up = wide.chunk(2, dim=-1)
    if activation == "silu":
        y = F.silu(gate) * up
    elif activation == "gelu":
        y = F.gelu(gate) * up
    elif activation == "gelu_tanh":
        y = F.gelu(gate, approximate="tanh") * up
    else:
        raise RuntimeError(f"activation must be silu, gelu or gelu_tanh; got {activation!r}")
    y = _transform(y, size, scale_hadamard, factor)
    return _finish(y, gate_up.dtype, bits, symmetric, clip, group, packed)


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
    """x [..., H, D] times (H_heads (x) I) in blocks of `heads` heads, then `quantize` of H * D."""
    y = _wide("x", x, bits, 2).mT
    y = _transform(y, heads, scale_hadamard, factor, name="heads").mT.flatten(-2)
    return _finish(y, x.dtype, bits, symmetric, clip, group, packed)


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
    """((acc * x_scale) * w_scale) summed over groups (+ bias) (+ residual), acc exact."""
    checks.linear(x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual, out_dtype)
    x_q = unpack_int4(x_q) if x_q.dtype == torch.uint8 else x_q
    weight = unpack_int4(w)
    groups = w_scale.shape[-1]
    width = weight.shape[-1] // groups
    y = torch.zeros((), device=x_q.device)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        acc = _exact_product(x_q[..., columns], weight[:, columns])
        if x_zero is not None and w_sum is not None:
            acc = acc.double() - x_zero.unsqueeze(-1).double() * w_sum[:, g].double()
        y = y + acc.float() * x_scale.unsqueeze(-1) * w_scale[:, g]
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype)


def prepack_int4(w_packed: Tensor) -> Tensor:
    """The identity: the reference reads the canonical layout."""
    checks.packed_weight("w_packed", w_packed)
    return w_packed.clone()


def unprepack_int4(w: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `prepack_int4`."""
    checks.columns("k", k)
    checks.tensor("w", w, torch.uint8, (n, k // 2))
    return w.clone()


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
    size: int = 1,
    factor: Tensor | None = None,
    k_clip: float = 0.95,
    v_clip: float = 0.95,
    block_table: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, quantize k and v, write them at `start` of the cache; return q."""
    checks.cache(q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, bits, block_table)
    checks.appended(q, k, v, cos, sin, k_codes.shape[1], start)
    for name, clip in (("k_clip", k_clip), ("v_clip", v_clip)):
        checks.require(0 < clip <= 1, f"{name} must be in (0, 1]", clip)
    batch, tokens = k.shape[:2]
    position = start.long()[:, None] + torch.arange(tokens, device=k.device)
    if k.device.type == "cpu" and tokens and batch:  # elsewhere this would wait for the device
        first, last = int(start.min()), int(start.max()) + tokens
        capacity = k_codes.shape[2] * (1 if block_table is None else block_table.shape[1])
        fits = first >= 0 and last <= capacity
        needs = f"start: the {tokens} token(s) must fit a capacity of {capacity}"
        checks.require(fits, needs, start.tolist())
    row = torch.arange(batch, device=k.device)[:, None]
    if block_table is not None:
        checks.blocks(block_table, k_codes, start, start + tokens)
        row = block_table.long().gather(1, position // k_codes.shape[2])
        position = position % k_codes.shape[2]
    q_rotated = _transform(rope(q, cos.unsqueeze(2), sin.unsqueeze(2)), size, None, factor)
    k_rotated = _transform(rope(k, cos.unsqueeze(2), sin.unsqueeze(2)), size, None, factor)
    for x, clip, cache in (
        (k_rotated, k_clip, (k_codes, k_scale, k_zero)),
        (v.float(), v_clip, (v_codes, v_scale, v_zero)),
    ):
        for store, value in zip(cache, _quantize_kv(x, bits, clip), strict=True):
            store[row, :, position] = value
    return q_rotated.to(q.dtype)


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
    """Causal softmax attention of q [B, S, H, D] over the quantized cache, in float32."""
    checks.cache(q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, bits, block_table)
    checks.require(window is None or window > 0, "window must be at least 1", window)
    if block_table is not None:
        seen = q.shape[1] - 1 + (window or k_codes.shape[2] * block_table.shape[1])
        checks.blocks(block_table, k_codes, (lengths - seen).clamp(min=0), lengths)
        k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = (
            _gather_blocks(x, block_table)
            for x in (k_codes, k_scale, k_zero, v_codes, v_scale, v_zero)
        )
    batch, queries, heads, dim = q.shape
    kv_heads, capacity = k_codes.shape[1:3]
    length = checks.visible(q, kv_heads, capacity, lengths, mask, length)
    if length == 0 or q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    keys = dequantize_kv(k_codes, k_scale, k_zero, length, bits)
    values = dequantize_kv(v_codes, v_scale, v_zero, length, bits)
    column = torch.arange(length, device=q.device)
    # What lies beyond a row's length is not a key, whatever memory holds there: 0 * NaN is NaN.
    beyond = column >= lengths[:, None]
    broken = ~(v_scale[:, :, :length].isfinite() | beyond[:, None])
    values = values.masked_fill((beyond[:, None] | broken)[..., None], 0)
    out = torch.empty(batch, kv_heads, heads // kv_heads, queries, dim, device=q.device)
    grouped = (q.float() * scale).permute(0, 2, 1, 3).unflatten(1, (kv_heads, -1))
    block = max(1, _SCORES // (batch * heads * length))
    for begin in range(0, queries, block):
        end = min(begin + block, queries)
        seen = max(length - queries + end, 1)  # no query of the block looks beyond
        offset = torch.arange(begin, end, device=q.device) - queries
        last = (lengths[:, None] + offset)[..., None]
        visible = column[:seen] <= last
        if window is not None:
            visible = visible & (column[:seen] > last - window)
        visible = visible[:, None]  # [B, 1, end - begin, seen]
        if mask is not None:
            visible = visible & mask[:, :, begin:end, :seen]
        groups = (kv_heads, -1) if visible.shape[1] > 1 else (1, 1)
        visible = visible.unflatten(1, groups)
        scores = grouped[:, :, :, begin:end] @ keys[:, :, None, :seen].mT
        weights = scores.masked_fill_(~visible, -torch.inf).softmax(dim=-1)
        part = weights @ values[:, :, None, :seen]
        part.masked_fill_(~visible.any(-1, keepdim=True), 0)  # sees nothing: softmax gave NaN
        if broken.any():  # a NaN value reaches only the queries that see it
            hit = (visible & broken[:, :, None, None, :seen]).any(-1, keepdim=True)
            part.masked_fill_(hit, torch.nan)
        out[:, :, :, begin:end] = part
    return out.flatten(1, 2).permute(0, 2, 1, 3).to(q.dtype).contiguous()


def _gather_blocks(x: Tensor, table: Tensor) -> Tensor:
    """A paged cache's part [blocks, kv_heads, size, ...] as [B, kv_heads, columns * size, ...]."""
    # Entries that are not used may name blocks that there are not.
    blocks = x[table.long().clamp(0, x.shape[0] - 1)]
    return blocks.transpose(1, 2).flatten(2, 3)


def _wide(name: str, x: Tensor, bits: int, dims: int = 1) -> Tensor:
    checks.floating(name, x, dims, wide=bits == 16)
    return x if x.dtype == torch.float64 else x.float()


def _transform(
    x: Tensor,
    size: int | None,
    scale: float | None,
    factor: Tensor | None,
    *,
    name: str = "size",
) -> Tensor:
    checks.transform(name, size, factor, x.shape[-1])
    # Summed in float64, so that every kernel's order of summation is as far from it as from exact.
    if size == 1 and scale in (None, 1):
        return x
    return _hadamard.transform(x.double(), size, scale, factor).to(x.dtype)


def _finish(
    y: Tensor,
    dtype: torch.dtype,
    bits: int,
    symmetric: bool,
    clip: float,
    group: int,
    packed: bool,
) -> Quantized:
    y = y.to(dtype) if bits == 16 else y
    return quantize(y, bits, symmetric=symmetric, clip=clip, group=group, packed=packed)


def _exact_product(x: Tensor, w: Tensor) -> Tensor:
    """x [..., k] @ w [n, k] of int8 codes, w in [-8, 7], without a rounding."""
    slices = list(zip(x.split(_EXACT_K, dim=-1), w.split(_EXACT_K, dim=-1), strict=True))
    parts = [a.float() @ b.float().mT for a, b in slices]
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.double() for part in parts]).sum(0)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R entries of x [..., D], cos and sin broadcast."""
    x, cos, sin = x.float(), cos.float(), sin.float()
    rotary = cos.shape[-1]
    first, second = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((x[..., :rotary] * cos + turned * sin, x[..., rotary:]), dim=-1)


def _quantize_kv(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., D] -> uint8 codes [..., D * bits / 8], float16 scale, uint8 zero [...]."""
    top = 2**bits - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    finite = low.isfinite() & high.isfinite()
    ratio = torch.full_like(low, clip)
    low, high = ratio * low.clamp(max=0), ratio * high.clamp(min=0)
    scale = ((high - low) / torch.full_like(low, top)).clamp(*_KV_SCALE_RANGE).half()
    inverse = scale.float().reciprocal()
    zero = (-low * inverse).round().clamp(0, top)
    codes = ((x * inverse).round() + zero).clamp(0, top)
    codes = torch.where(finite, codes, 0).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    scale = torch.where(finite, scale, torch.nan)
    zero = torch.where(finite, zero, 0).to(torch.uint8)
    return codes, scale.squeeze(-1), zero.squeeze(-1)


def dequantize_kv(codes: Tensor, scale: Tensor, zero: Tensor, length: int, bits: int) -> Tensor:
    """The first `length` cached vectors as float32 [B, kv_heads, length, D]."""
    codes, scale, zero = codes[:, :, :length], scale[:, :, :length], zero[:, :, :length]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (codes.float() - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
