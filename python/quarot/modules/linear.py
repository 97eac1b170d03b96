"""Linears of a converted model: as a checkpoint names them, and as the kernels read them.

`CanonicalLinear` is one linear under its Hugging Face name; its tensors are what a checkpoint
holds. `QuantizedLinear` is one or several linears that read the same input (q|k|v, gate|up),
stacked along their output rows into one kernel buffer. A decoder layer holds the weights in exactly
one of the two: `fuse` moves them from the first into the second, `unfuse` back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from quarot import ops
from quarot.ops import reference

_BACKENDS: dict[str, ModuleType] = {"kernel": ops, "reference": reference}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a model may compute in."""


def backend_ops(backend: str) -> ModuleType:
    """Return the module of ops that `backend` ("kernel" or "reference") names."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend: got {backend!r}, needs one of {', '.join(_BACKENDS)}")
    return _BACKENDS[backend]


class CanonicalLinear(nn.Module):
    """Name the tensors of one linear in a state dict; it computes nothing.

    4-bit weights: `weight_packed` uint8 [out_features, in_features / 2] and `weight_scale` float32
    [out_features, groups]. 16-bit: `weight` [out_features, in_features]. `bias` [out_features].

    Args:
        bits: 4 or 16;  group: input columns that share a scale, 0 = all of them.
        bias: whether there is one;  dtype: of `weight` and `bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group: int = 0,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if bits == 4:
            groups = in_features // group if group else 1
            self.specs["weight_packed"] = (out_features, in_features // 2), torch.uint8
            self.specs["weight_scale"] = (out_features, groups), torch.float32
        else:
            self.specs["weight"] = (out_features, in_features), dtype
        if bias:
            self.specs["bias"] = (out_features,), dtype
        for name, (shape, kind) in self.specs.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    def take(self) -> dict[str, Tensor]:
        """Return the tensors and keep none: their state-dict entries are the layer's to write."""
        tensors = {name: self.get_buffer(name) for name in self.specs}
        for name in self.specs:
            delattr(self, name)
        return tensors

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Hold `tensors`, the inverse of `take`."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the weights are part of a fused kernel buffer."""
        raise RuntimeError(
            "this linear only names tensors of a quarot checkpoint; its decoder layer computes it "
            "together with its neighbours, so it can be neither called nor wrapped by itself"
        )

    def extra_repr(self) -> str:
        """Show the sizes, as nn.Linear does."""
        bias = "bias" in self.specs
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CanonicalLinear:
        _apply_but_scale(self, fn, recurse)
        return self


class QuantizedLinear(nn.Module):
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
                without a scale, a float tensor.
            residual: [..., n].
        """
        run = backend_ops(self.backend)
        if self.bits == 4 and x_scale is not None:
            return run.linear_int4(
                x,
                x_scale,
                x_zero,
                self.weight,
                self.weight_scale,
                self.weight_sum,
                self.bias,
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
        # The kernel layout belongs to a device: it travels by rows and is packed again there.
        packed = self.weight if self.bits == 4 else None
        if packed is None or check_dtype(fn, packed.device) == packed.device:
            _apply_but_scale(self, fn, recurse)
            return self
        rows = fn(self._rows())
        self.weight = packed = None
        _apply_but_scale(self, fn, recurse)
        self.weight = backend_ops(self.backend).prepack_int4(rows)
        return self


def check_dtype(fn: Callable[[Tensor], Tensor], device: torch.device) -> torch.device:
    """Return the device to which `fn`, a function of `Module._apply`, moves tensors of `device`.

    Raises:
        TypeError: it would make a model of another dtype than bfloat16, float16 or float32.
    """
    moved = fn(torch.empty(0, device=device))
    if moved.dtype not in _DTYPES:
        raise TypeError(
            f"dtype: got {moved.dtype}, a quarot model computes in bfloat16, float16 or float32"
        )
    return moved.device


def _apply_but_scale(
    module: CanonicalLinear | QuantizedLinear, fn: Callable[[Tensor], Tensor], recurse: bool
) -> None:
    """Apply `fn` to a module's tensors, to `weight_scale` only if it leaves it float32."""
    scale = module._buffers.get("weight_scale")
    if scale is None:
        nn.Module._apply(module, fn, recurse)
        return
    moved = fn(scale)
    module._buffers["weight_scale"] = None
    nn.Module._apply(module, fn, recurse)
    kept = moved if moved.dtype == scale.dtype else scale.to(moved.device)
    module._buffers["weight_scale"] = kept
