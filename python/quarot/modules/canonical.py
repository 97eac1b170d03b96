"""A decoder layer as a checkpoint names it: the sub-tree of dotted names and its tensors.

The names are the transformers layer's, from the architecture's description, with `weight_packed`
and `weight_scale` in place of a 4-bit `weight`. The modules here compute nothing: they hold the
tensors while a checkpoint is read, until `DecoderLayer.fuse` takes the linears' away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quarot.config import QuarotConfig
from quarot.models.base import Architecture, Geometry
from quarot.modules.watched import Watched
from quarot.quantize import grid

_K_MULTIPLE = 32  # linear_int4 reads this many codes of a row at a time

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a model may have and compute in; what is not quantized keeps it."""


def build(
    layer: nn.Module,
    architecture: Architecture,
    geometry: Geometry,
    config: QuarotConfig,
    *,
    biases: Iterable[str],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> None:
    """Give `layer` the sub-tree of its linears and norms, with uninitialised tensors.

    Raises:
        ValueError: a linear's width does not suit 4-bit weights or their group.
    """
    biases = frozenset(biases)
    for path, (rows, columns) in linear_shapes(architecture, geometry).items():
        _check_width(path, columns, config)
        linear = CanonicalLinear(
            columns,
            rows,
            bits=config.w_bits,
            group=config.w_group,
            bias=path in biases,
            dtype=dtype,
            device=device,
        )
        _place(layer, path, linear)
    for path, size in norm_shapes(architecture, geometry).items():
        _place(layer, path, NormWeight(size, dtype, device))


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
        apply_but_scale(self, fn, recurse)
        return self


class NormWeight(Watched):
    """Hold the weight [size] of an RMSNorm; the norm itself is part of a fused op."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(size, dtype=dtype, device=device), requires_grad=False
        )


class _Names(nn.Module):
    """A node of the sub-tree of names: only there to be walked, its children stay what they are.

    An adapter (peft …) that put its own module in a linear's place would silently compute nothing.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_modules", ()):
            raise RuntimeError(
                f"{name}: got a {type(value).__name__} to replace it; the linears of a converted "
                "layer are fused and can be neither replaced nor wrapped"
            )
        super().__setattr__(name, value)


def linear_shapes(architecture: Architecture, geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Return path -> (out_features, in_features) of a layer's linears."""
    a, g = architecture, geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    return {
        a.q: (q, g.hidden),
        a.k: (kv, g.hidden),
        a.v: (kv, g.hidden),
        a.o: (g.hidden, q),
        a.gate: (g.intermediate, g.hidden),
        a.up: (g.intermediate, g.hidden),
        a.down: (g.hidden, g.intermediate),
    }


def norm_shapes(architecture: Architecture, geometry: Geometry) -> dict[str, int]:
    """Return path -> size of a layer's norms."""
    shapes = dict.fromkeys(architecture.norm_readers, geometry.hidden)
    for path in (architecture.q_norm, architecture.k_norm):
        if path is not None:
            shapes[path] = geometry.head_dim
    return shapes


def _check_width(path: str, columns: int, config: QuarotConfig) -> None:
    if config.w_bits == 16:
        return
    if columns % _K_MULTIPLE:
        raise ValueError(
            f"{path}: has {columns} input columns, 4-bit weights need a multiple of {_K_MULTIPLE}"
        )
    try:
        grid.check_group(config.w_group, columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _place(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `layer`, making the nodes on the way."""
    *nodes, name = path.split(".")
    node = layer
    for part in nodes:
        if part not in node._modules:
            node.add_module(part, _Names())
        node = node.get_submodule(part)
    node.add_module(name, module)


def check_dtype(fn: Callable[[Tensor], Tensor], device: torch.device) -> torch.device:
    """Return the device to which `fn`, a function of `Module._apply`, moves tensors of `device`.

    Raises:
        TypeError: it would make a model of another dtype than bfloat16, float16 or float32.
    """
    moved = fn(torch.empty(0, device=device))
    if moved.dtype not in DTYPES:
        raise TypeError(
            f"dtype: got {moved.dtype}, a quarot model computes in bfloat16, float16 or float32"
        )
    return moved.device


def apply_but_scale(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
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
