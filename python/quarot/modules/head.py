"""The head of a converted model: torch's linear layer, on rows.

`generate` keeps the last token of a prompt, a slice whose strides are those of the whole prompt.
torch's bf16 product on a CPU with AMX then copies the whole weight first: 80 of 216 ms of a prompt
of 512 tokens (SmolLM2-135M, torch 2.11).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Head(nn.Linear):
    """Multiply rows, whatever strides the dimensions before them have."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., vocabulary] of input [..., hidden]."""
        rows = super().forward(input.reshape(-1, input.shape[-1]))
        return rows.view(*input.shape[:-1], rows.shape[-1])


def take_over(head: Any) -> None:
    """Make a plain linear layer a `Head`; leave others alone.

    Its class is swapped, because a method on the instance would not survive deepcopy.
    """
    if type(head) is nn.Linear:
        head.__class__ = Head
