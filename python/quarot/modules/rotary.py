"""Rotary frequencies that stay float32 when a converted model is cast, and their cheap angles.

No checkpoint holds them: a loaded model computes them anew, in float32. transformers' own modules
let `model.to(torch.bfloat16)` round them, and a model so cast computes other angles than the same
model saved and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quarot.modules.swapped import mixed, swap_class


def take_over(rotary: Any) -> None:
    """Make casts of `rotary`, a transformers rotary embedding, leave its buffers' dtypes alone."""
    if not isinstance(rotary, _Rotary):
        swap_class(rotary, mixed, _Rotary)


class _Rotary(nn.Module):
    inv_freq: Tensor
    attention_scaling: float

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [batch, tokens, rotary_dim] of x's dtype.

        transformers' results in four kernels of its ten, which a decode step waits for.
        """
        # Some kinds choose frequencies by the positions.
        fixed = getattr(self, "rope_type", None) in ("default", "linear", "llama3")
        if not (fixed and x.is_cuda and self.attention_scaling == 1):
            return super().forward(x, position_ids)
        half = position_ids[..., None] * self.inv_freq
        angles = torch.cat((half, half), dim=-1)
        cos, sin = torch.empty_like(angles, dtype=x.dtype), torch.empty_like(angles, dtype=x.dtype)
        return torch.cos(angles, out=cos), torch.sin(angles, out=sin)
