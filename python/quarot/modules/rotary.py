"""Rotary frequencies that stay float32 when a converted model is cast.

No checkpoint holds them: a loaded model computes them anew, in float32. transformers' own modules
let `model.to(torch.bfloat16)` round them, and a model so cast computes other angles than the same
model saved and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from quarot.modules.swapped import mixed, swap_class


def keep_float32(rotary: Any) -> None:
    """Make casts of `rotary`, a transformers rotary embedding, leave its buffers' dtypes alone."""
    if not isinstance(rotary, _KeepsDtypes):
        swap_class(rotary, mixed, _KeepsDtypes)


class _KeepsDtypes(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
