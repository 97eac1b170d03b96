"""Replay a decoder layer's step on the CPU: what a CUDA graph is on a GPU.

A token's step is ten op calls a layer, each of some microseconds; Python and torch's dispatcher
would take the larger part of it. So a layer's first step with a cache is recorded
(`csrc/ops/tape.h`), and the next ones make the same kernel calls on the same memory, with new
input, which gives the same bits. A tape is left as soon as anything it relies on may have changed:
the cache's buffers, the weights, shapes, hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module
from transformers.cache_utils import Cache

from quarot.cache import QuantizedLayer
from quarot.modules import linear
from quarot.ops.library import Tape

enabled = True
"""Whether steps are replayed at all."""

MOST_ROWS = 16
"""Sequences up to which calls are so short that it matters."""
CALLS = 10
"""Kernel calls of a step."""

# Not on the layers: those are copied and saved, tapes cannot be.
_tapes: weakref.WeakKeyDictionary[Any, _Tape] = weakref.WeakKeyDictionary()


def step(
    layer: Any, compute: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor], x: Tensor,
    cache: Any, position_embeddings: tuple[Tensor, Tensor],
) -> Tensor | None:  # fmt: skip
    """Return the layer's output for one more token of each row without a mask, or None.

    Args:
        compute: runs the layer as ever, on x and the position embeddings.
        x: [batch, 1, hidden];  cache: what the layer was given;
        position_embeddings: (cos, sin), each [1 or batch, 1, rotary_dim].
    """
    cos, sin = position_embeddings
    if not (enabled and type(x) is Tensor and x.device.type == "cpu" and x.shape[0] <= MOST_ROWS):
        return None
    if not isinstance(cache, Cache) or len(cache.layers) <= layer.index:
        return None
    held = cache.layers[layer.index]
    if type(held) is not QuantizedLayer or held.spec != layer.cache_spec or not held.length:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    batch = x.shape[0]
    start, _ = held.reserve(batch, 1, x.device)  # may grow, hence before the tape is looked at
    tape = _tapes.get(layer)
    if tape is None or not tape.fits(held, start, x, cos, sin):
        tape = _tapes[layer] = _Tape(layer, held, start, x, cos, sin)
        return tape.record(compute)
    if not tape.usable or any(tape.hooks):
        return None
    out = tape.run(x, cos, sin)
    held.advance(1)
    return out


class _Tape:
    """A layer's step, recorded, and what it relies on."""

    def __init__(
        self, layer: Any, held: QuantizedLayer, start: Tensor, x: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        self.stamp, self.start, self.moves = held.stamp, start, linear.moves()
        self.norms = list(layer._norms.values())
        self.addresses = self._addresses()
        self.hooks = [module._global_forward_hooks, module._global_forward_pre_hooks]
        for kernel in layer.kernels.values():
            self.hooks += kernel._forward_hooks, kernel._forward_pre_hooks
        # With 16 bits anywhere, or norms of q and k, torch computes in between: no tape has that.
        config, norms = layer.config, layer._norms
        self.integer = layer.backend == "kernel" and not {"q_norm", "k_norm"} & norms.keys()
        self.integer &= max(config.w_bits, config.a_bits, config.kv_bits) < 16
        self.shape, self.dtype = x.shape, x.dtype
        self.angles = cos.shape, cos.dtype
        # Where the calls find their input; contiguous, as `fits` asks of those to come.
        self.inputs = [t.clone(memory_format=torch.contiguous_format) for t in (x, cos, sin)]
        self.tape = Tape([(t.data_ptr(), t.nbytes) for t in self.inputs])
        self.usable = False
        self.result = 0, 0

    def _addresses(self) -> list[int]:
        return [norm.weight.data_ptr() for norm in self.norms]

    def fits(
        self, held: QuantizedLayer, start: Tensor, x: Tensor, cos: Tensor, sin: Tensor
    ) -> bool:
        """Tell whether a step would make the calls recorded."""
        return (
            self.stamp is held.stamp
            and self.start is start
            and self.moves == linear.moves()
            and x.shape == self.shape
            and x.dtype == self.dtype
            and (cos.shape, cos.dtype) == (sin.shape, sin.dtype) == self.angles
            and x.is_contiguous()
            and cos.is_contiguous()
            and sin.is_contiguous()
            and self._addresses() == self.addresses
        )

    def record(self, compute: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]) -> Tensor:
        """Run the step, noting its calls."""
        x, cos, sin = self.inputs
        self.tape.begin()
        try:
            out = compute(x, (cos, sin))
        finally:
            self.tape.end()
        self.usable = self.integer and self.tape.calls == CALLS
        self.result = out.data_ptr(), out.nbytes
        return out.clone()

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Make the calls on another input; return the output."""
        out = torch.empty_like(x)
        self.tape.run([x.data_ptr(), cos.data_ptr(), sin.data_ptr()], self.result, out.data_ptr())
        return out
