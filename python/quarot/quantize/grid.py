"""The int4 grid of weights: scales by clip search, codes, packing.

A scale covers a row, or `group` columns of it, symmetric around zero: w is about scale * code, code
in [-8, 7] (DESIGN section 4). All arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarot import ops
from quarot.config import WEIGHT_GROUPS

SHRINK_FACTORS = tuple(percent / 100 for percent in range(100, 20, -1))
"""Shrink factors of the clip search, in the order they are tried: 1.00, 0.99 … 0.21."""

_QMAX = 7
_SCALE_FLOOR = 2.0**-126  # smallest normal float32
# Weights searched at once. On a CPU a few arrays of 1 MiB, which caches hold; on a GPU, where each
# step costs a launch, of 64 MiB.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


def weight_scales(
    w: Tensor,
    bits: int = 4,
    group: int = 0,
    clip_search: bool = True,
    norm: float = 2.4,
    weights: Tensor | None = None,
) -> Tensor:
    """Choose the scales of a weight matrix.

    A row (or group) has the scale p * max|w| / 7 with p the shrink factor, among `SHRINK_FACTORS`,
    of the least error sum |scale * code - w|^norm, the first of equals; without the search p = 1.
    QuaRot (arXiv 2404.00456), section 5: RTN with clip search.

    Args:
        w: float [out, in].
        bits: 4.
        group: columns that share a scale; 0 = the whole row.
        clip_search: search p.
        norm: exponent of the error.
        weights: float [in] ≥ 0, importance of each column's error; None = equal.

    Returns:
        float32 [out, in / group] (one column when group is 0), all finite and above 0.

    Raises:
        ValueError: bits is not 4, w is not a finite matrix, group does not divide its columns, or
            weights is not one number a column.
    """
    if bits != 4:
        raise ValueError(f"bits: got {bits}, needs 4")
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"w: got {w.dtype} {list(w.shape)}, needs a float matrix [out, in]")
    rows, columns = w.shape
    check_group(group, columns)
    if weights is not None and weights.shape != (columns,):
        raise ValueError(
            f"weights: got {list(weights.shape)}, needs one number a column, [{columns}]"
        )
    groups = columns // group if group else 1
    importance = None if weights is None else weights.float().reshape(groups, -1)
    scales = w.new_empty((rows, groups), dtype=torch.float32)
    step = max(1, _BLOCK.get(w.device.type, _BLOCK["cpu"]) // max(columns, 1))
    for begin in range(0, rows, step):
        block = w[begin : begin + step].float().reshape(-1, groups, columns // groups)
        amax = torch.linalg.vector_norm(block, torch.inf, dim=-1)
        if not amax.isfinite().all():
            raise ValueError("w: got NaN or infinite weights, needs finite ones")
        shrink = torch.ones_like(amax)
        if clip_search:
            shrink = _search(block, amax, norm, importance)
        scales[begin : begin + step] = _scale(amax, shrink)
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


def _scale(amax: Tensor, shrink: Tensor) -> Tensor:
    # A tensor divisor: by a number, CUDA would multiply by its rounded reciprocal.
    scale = shrink * amax / torch.full_like(amax, _QMAX)
    return torch.where(scale < _SCALE_FLOOR, 1.0, scale)


def _search(x: Tensor, amax: Tensor, norm: float, importance: Tensor | None) -> Tensor:
    """Return the shrink factor of least error, [rows, groups], for x [rows, groups, width].

    A power costs five times the rest of a trial. Where norm > 2, Hölder's inequality bounds the
    error from below by the squares, sum |e|^norm >= width^(1 - norm / 2) (sum e^2)^(norm / 2), so
    that every factor is tried with squares and about one in four with the power.
    """
    shape = amax.shape
    rows, amax = x.flatten(0, 1), amax.flatten()
    shrinks = torch.tensor(SHRINK_FACTORS, device=x.device)
    inverses = _scale(amax, shrinks[:, None]).reciprocal()
    column_weights = mass = None
    if importance is not None:
        column_weights = importance.expand(x.shape).flatten(0, 1)
        mass = column_weights.sum(-1)

    def squares(trial: int, subset: Tensor | slice) -> Tensor:
        """((x - code * scale) / scale)^2 of a subset of the rows."""
        steps = rows[subset] * inverses[trial, subset, None]
        return steps.round().clamp_(-_QMAX - 1, _QMAX).sub_(steps).square_()

    def error(values: Tensor, trial: int, subset: Tensor | slice, power: float) -> Tensor:
        """Sum over columns, relative to the largest weight so that small rows do not underflow."""
        if column_weights is not None:
            values *= column_weights[subset]
        return values.sum(-1) * SHRINK_FACTORS[trial] ** power

    def power_error(trial: int, subset: Tensor) -> Tensor:
        values = squares(trial, subset).log2_().mul_(norm / 2).exp2_()  # 3x faster than pow
        return error(values, trial, subset, norm)

    every = slice(None)
    bound = torch.stack([error(squares(i, every), i, every, 2) for i in range(len(shrinks))])
    if norm == 2:
        return shrinks[bound.argmin(0)].view(shape)
    limit = torch.full_like(amax, torch.inf)
    if norm > 2:
        total = x.shape[-1] if mass is None else mass
        bound = bound ** (norm / 2) * total ** (1 - norm / 2) * (1 - 1e-4)  # less rounding errors
        guess = bound.argmin(0)
        for trial in guess.unique().tolist():
            subset = (guess == trial).nonzero().squeeze(-1)
            limit[subset] = power_error(trial, subset)
    else:
        bound.zero_()
    best, choice = torch.full_like(amax, torch.inf), torch.zeros_like(amax, dtype=torch.long)
    for trial in range(len(shrinks)):
        subset = (bound[trial] <= torch.minimum(best, limit)).nonzero().squeeze(-1)
        errors = power_error(trial, subset)
        better = errors < best[subset]
        best[subset[better]] = errors[better]
        choice[subset[better]] = trial
    return shrinks[choice].view(shape)
