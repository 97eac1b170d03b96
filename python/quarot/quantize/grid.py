"""The int4 grid of weights: scales by clip search, codes, packing.

A scale covers a row, or `group` columns of it, symmetric around zero: w is about scale * code, code
in [-8, 7] (CONTRIBUTING.md). All arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarot import ops
from quarot.config import WEIGHT_GROUPS

_QMAX = 7


def weight_scales(
    w: Tensor,
    bits: int = 4,
    group: int = 0,
    clip_search: bool = True,
    norm: float = 2.4,
    importance: Tensor | None = None,
) -> Tensor:
    """Choose the scales of a weight matrix: `ops.clip_search`, or max|w| / 7 without the search.

    Args:
        w: float [out, in].
        bits: 4.
        group: columns that share a scale; 0 = the whole row.
        clip_search: search p.
        norm: exponent of the error.
        importance: float [in] ≥ 0, weight of each column's error; None = equal.

    Returns:
        float32 [out, in / group] (one column when group is 0), all finite and above 0.

    Raises:
        ValueError: bits is not 4, w is not a finite matrix, group does not divide its columns, or
            importance is not one number a column.
    """
    if bits != 4:
        raise ValueError(f"bits: got {bits}, needs 4")
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"w: got {w.dtype} {list(w.shape)}, needs a float matrix [out, in]")
    columns = w.shape[1]
    check_group(group, columns)
    if importance is not None and importance.shape != (columns,):
        raise ValueError(
            f"importance: got {list(importance.shape)}, needs one number a column, [{columns}]"
        )
    w = w if w.dtype in (torch.bfloat16, torch.float16) else w.float()
    scales: Tensor | None
    if clip_search:
        importance = None if importance is None else importance.float()
        scales = ops.clip_search(w, norm, group, importance)
    else:
        scales = ops.quantize(w, bits, group=group or columns)[1]
    assert scales is not None  # None only with bits=16
    if not scales.isfinite().all():
        raise ValueError("w: got NaN or infinite weights, needs finite ones")
    return scales


def check_group(group: int, columns: int) -> None:
    """Raise ValueError, with the groups of `WEIGHT_GROUPS` that would do, unless `group` fits."""
    if group < 0 or (group and columns % group):
        fitting = [str(size) for size in WEIGHT_GROUPS if size and columns % size == 0]
        raise ValueError(
            f"group: got {group} for {columns} input columns, needs a divisor of them "
            f"({', '.join(fitting) or 'none'}), or 0 = the whole row"
        )


def codes(w: Tensor, scale: Tensor) -> Tensor:
    """Round w [out, in] to the grid of `scale` [out, groups]: int8 [out, in] in [-8, 7]."""
    steps = w.float().reshape(*scale.shape, -1) * scale.reciprocal().unsqueeze(-1)
    return steps.round_().clamp_(-_QMAX - 1, _QMAX).to(torch.int8).reshape(w.shape)


def pack(codes: Tensor) -> Tensor:
    """Pack int8 codes [out, in] into uint8 [out, in/2], the even column in the low nibble."""
    return ops.pack_int4(codes)
