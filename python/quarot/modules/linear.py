"""Linears of a converted model as the kernels read them.

A `QuantizedLinear` is one or several linears that read the same input (q|k|v, gate|up), stacked
along their output rows into one kernel buffer. A decoder layer holds the weights either here or
under their canonical names, never in both: `fuse` moves them here, `unfuse` back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from quarot import ops
from quarot.modules.canonical import CanonicalLinear, apply_but_scale, check_dtype
from quarot.modules.watched import Watched, count_move
from quarot.modules.watched import moves as moves
from quarot.ops import reference

BACKENDS: dict[str, ModuleType] = {"kernel": ops, "reference": reference}
"""Name of a backend -> its ops."""


def backend_ops(backend: str) -> ModuleType:
    """Return the module of ops that `backend` names; raise ValueError on an unknown one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, needs one of {', '.join(BACKENDS)}")
    return BACKENDS[backend]


class QuantizedLinear(Watched):
    """Multiply quantized activations by several linears' rows at once.

    Buffers, non-persistent: `weight` in the kernel's layout (bits 4) or [n, k] (bits 16),
    `weight_scale` float32 [n, groups], `weight_sum` int32 [n, groups] (only where activations have
    zero points), `bias` [n]; n = all output rows, k = in_features.

    Args:
        parts: the linears, in the order of their rows; they are moved from, not kept.
        bits: of their weights: 4 or 16;  zero_points: whether activations have zero points.
        backend: "kernel" or "reference".
    """

    weight: Tensor | None
    weight_scale: Tensor | None
    weight_sum: Tensor | None
    bias: Tensor | None

    def __init__(
        self, parts: Sequence[CanonicalLinear], *, bits: int, zero_points: bool, backend: str
    ) -> None:
        super().__init__()
        self.in_features = parts[0].in_features
        self.rows = [part.out_features for part in parts]
        self.biases = ["bias" in part.specs for part in parts]
        self.bits, self.zero_points, self.backend = bits, zero_points, backend
        for name in ("weight", "weight_scale", "weight_sum", "bias"):
            self.register_buffer(name, None, persistent=False)

    def fuse(self, parts: Sequence[CanonicalLinear]) -> None:
        """Take the weights out of `parts` into the kernel buffers."""
        count_move()
        taken = [part.take() for part in parts]

        def stack(name: str) -> Tensor:
            tensors = [tensors.pop(name) for tensors in taken]
            return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)

        if any(self.biases):
            first = next(tensors["bias"] for tensors in taken if "bias" in tensors)
            for rows, tensors in zip(self.rows, taken, strict=True):
                tensors.setdefault("bias", first.new_zeros(rows))
            self.bias = stack("bias")
        if self.bits == 16:
            self.weight = stack("weight")
            return
        self.weight_scale = stack("weight_scale")
        packed = stack("weight_packed")
        if self.zero_points:
            groups = self.weight_scale.shape[1]
            grouped = reference.unpack_int4(packed).unflatten(1, (groups, -1))
            self.weight_sum = grouped.sum(-1, dtype=torch.int32)
        self.weight = backend_ops(self.backend).prepack_int4(packed)

    def unfuse(self, parts: Sequence[CanonicalLinear]) -> None:
        """Move the weights back into `parts`."""
        count_move()
        for part, tensors in zip(parts, self.canonical(), strict=True):
            part.put(tensors)
        self.weight = self.weight_scale = self.weight_sum = self.bias = None

    def canonical(self) -> list[dict[str, Tensor]]:
        """Return each part's checkpoint tensors, as copies that share no memory."""
        stacked = {"bias": self.bias, "weight_scale": self.weight_scale}
        stacked["weight" if self.bits == 16 else "weight_packed"] = self._rows()
        parts: list[dict[str, Tensor]] = [{} for _ in self.rows]
        for name, tensor in stacked.items():
            if tensor is None:
                continue
            for part, rows in zip(parts, tensor.split(self.rows), strict=True):
                part[name] = rows.clone()
        for part, bias in zip(parts, self.biases, strict=True):
            if not bias:
                part.pop("bias", None)
        return parts

    def forward(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        x_zero: Tensor | None,
        residual: Tensor | None = None,
        *,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Return x @ W.T (+ bias) (+ residual): [..., n] of `out_dtype`.

        Args:
            x: int8 codes [..., k] with x_scale float32 [...] and x_zero int32 [...] or None; or,
                without a scale, a float tensor. Where either side has 16 bits there is no integer
                product: the other one is dequantized to `out_dtype` for the call, and torch
                multiplies (W4A16 saves memory, not time).
            residual: [..., n].
        """
        run = backend_ops(self.backend)
        if self.bits == 4 and x_scale is not None:
            held = self._buffers  # not by attribute: nn.Module looks there last
            return run.linear_int4(
                x,
                x_scale,
                x_zero,
                held["weight"],
                held["weight_scale"],
                held["weight_sum"],
                held["bias"],
                residual,
                out_dtype=out_dtype,
            )
        weight = self._rows()
        if self.bits == 4:
            weight = run.dequantize(weight, self.weight_scale, dtype=out_dtype)
        if x_scale is not None:
            x = run.dequantize(x, x_scale, x_zero, dtype=out_dtype)
        y = functional.linear(x.to(out_dtype), weight, self.bias)
        return y if residual is None else residual + y

    def _rows(self) -> Tensor:
        """Return the weight by rows: packed codes [n, k / 2], or [n, k] at 16 bits."""
        if self.weight is None:
            raise RuntimeError("weights: not in kernel buffers yet; call the layer's fuse() first")
        if self.bits == 16:
            return self.weight
        run = backend_ops(self.backend)
        return run.unprepack_int4(self.weight, sum(self.rows), self.in_features)

    def extra_repr(self) -> str:
        """Show the sizes and the bits."""
        return f"in_features={self.in_features}, rows={self.rows}, bits={self.bits}, {self.backend}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        count_move()
        # The kernel layout belongs to a device: it travels by rows and is packed again there.
        packed = self.weight if self.bits == 4 else None
        if packed is None or check_dtype(fn, packed.device) == packed.device:
            apply_but_scale(self, fn, recurse)
            return self
        rows = fn(self._rows())
        self.weight = packed = None
        apply_but_scale(self, fn, recurse)
        self.weight = backend_ops(self.backend).prepack_int4(rows)
        return self
