"""The norm before the head, in one kernel of torch's where transformers has eight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from quarot.modules.swapped import mixed, swap_class


def take_over(norm: Any) -> None:
    """Make `norm`, a transformers RMSNorm, use torch's on a GPU."""
    if not isinstance(norm, _Norm):
        swap_class(norm, mixed, _Norm)


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states over their root mean square, times the weight (ones: rotated)."""
        if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        shape = self.weight.shape
        return functional.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon)
