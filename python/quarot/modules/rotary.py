"""Rotary frequencies that stay float32 when a converted model is cast.

No checkpoint holds them: a loaded model computes them anew, in float32. transformers' own modules
let `model.to(torch.bfloat16)` round them, and a model so cast computes other angles than the same
model saved and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def keep_float32(rotary: Any) -> None:
    """Make casts of `rotary`, a transformers rotary embedding, leave its buffers' dtypes alone.

    Its class is swapped, because a method on the instance would not survive deepcopy.
    """
    kind = type(rotary)
    if not issubclass(kind, _KeepsDtypes):  # transformers goes by the name
        rotary.__class__ = type(kind.__name__, (_KeepsDtypes, kind), {})


class _KeepsDtypes(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
