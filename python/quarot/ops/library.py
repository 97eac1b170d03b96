"""Load the compiled library, and give its ops what torch needs beside kernels.

Importing this module registers, for each op of `csrc/ops/library.cpp`: a *fake* (shapes and dtypes
for `torch.compile` and meta tensors), and the reference as fallback for devices without a kernel.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quarot.ops import reference

_log = logging.getLogger("quarot")

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
"""Device type -> dispatch key of the devices that kernels are written for."""


def has_kernel(op: str, device: str) -> bool:
    """Whether the library has its own kernel of `op` for a device type."""
    return device in DEVICES and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"quarot::{op}", DEVICES[device]
    )


def _load() -> None:
    try:
        importlib.import_module("quarot._C")
    except ImportError as error:
        raise ImportError(
            f"quarot's compiled library quarot._C does not load under torch {torch.__version__}: "
            f"{error}. Likely causes: the package was not built (pip install .), torch is older "
            "than 2.11, or the build is stale after a change of Python or torch (build it again)"
        ) from error


def _fallback(op: str) -> Callable[..., Any]:
    """Return the op's reference, called with the schema's arguments, noting its first use.

    It raises RuntimeError if the tensors are on several devices, as a kernel does.
    """
    function = getattr(reference, op)
    names = list(inspect.signature(function).parameters)  # the order of the schema
    noted: set[str] = set()

    def run(*args: Any) -> Any:
        device = args[0].device
        for name, value in zip(names, args, strict=True):
            if isinstance(value, Tensor) and value.device != device:
                raise RuntimeError(
                    f"quarot::{op}: {name} must be on the device of {names[0]}, {device}; "
                    f"got {value.device}"
                )
        if device.type not in noted:
            noted.add(device.type)
            _log.warning(
                "quarot::%s has no kernel for %s: its reference runs there", op, device.type
            )
        return function(**dict(zip(names, args, strict=True)))

    return run


def _fake_quantized(
    x: Tensor, n: int, symmetric: bool, group: int, packed: bool, rows: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = x.new_empty(
        (*rows, n // 2 if packed else n), dtype=torch.uint8 if packed else torch.int8
    )
    shape = (*rows, n // group) if group else rows
    zero = None if symmetric else x.new_empty(shape, dtype=torch.int32)
    return codes, x.new_empty(shape, dtype=torch.float32), zero


def _hadamard(x: Tensor, size: int, factor: Tensor | None, scale: float) -> Tensor:
    return x.new_empty(x.shape)


def _quantize(
    x: Tensor, bits: int, symmetric: bool, clip: float, group: int, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _fake_quantized(x, x.shape[-1], symmetric, group, packed, x.shape[:-1])


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    n = q.shape[-1] * (2 if q.dtype == torch.uint8 else 1)
    return q.new_empty((*q.shape[:-1], n), dtype=dtype)


def _pack_int4(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], q.shape[-1] // 2), dtype=torch.uint8)


def _unpack_int4(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=torch.int8)


def _clip_search(w: Tensor, norm: float, group: int, importance: Tensor | None) -> Tensor:
    rows, columns = w.shape
    return w.new_empty((rows, columns // group if group else 1), dtype=torch.float32)


def _hadamard_quantize(
    x: Tensor, size: int, factor: Tensor | None, scale: float, bits: int, *quantizer: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _quantize(x, bits, *quantizer)


def _rmsnorm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, bits: int, *quantizer: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _quantize(x, bits, *quantizer)


def _glu_hadamard_quantize(
    gate_up: Tensor,
    activation: str,
    size: int,
    factor: Tensor | None,
    scale: float,
    bits: int,
    symmetric: bool,
    clip: float,
    group: int,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    n = gate_up.shape[-1] // 2
    return _fake_quantized(gate_up, n, symmetric, group, packed, gate_up.shape[:-1])


def _head_hadamard_quantize(
    x: Tensor,
    heads: int,
    factor: Tensor | None,
    scale: float,
    bits: int,
    symmetric: bool,
    clip: float,
    group: int,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    n = x.shape[-2] * x.shape[-1]
    return _fake_quantized(x, n, symmetric, group, packed, x.shape[:-2])


def _linear_int4(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


def _prepack_int4(w_packed: Tensor) -> Tensor:
    device = w_packed.device.type
    if not has_kernel("prepack_int4", device):
        return w_packed.new_empty(w_packed.shape)
    n, pairs = w_packed.shape  # the layouts stand in csrc/kernels/linear_int4.h
    columns = (-(-pairs // 32), 512) if device == "cuda" else (pairs // 4, 64)
    return w_packed.new_empty((-(-n // 16), *columns))


def _unprepack_int4(w: Tensor, n: int, k: int) -> Tensor:
    return w.new_empty((n, k // 2))


def _attend(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "hadamard": _hadamard,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "pack_int4": _pack_int4,
    "unpack_int4": _unpack_int4,
    "clip_search": _clip_search,
    "hadamard_quantize": _hadamard_quantize,
    "rmsnorm_quantize": _rmsnorm_quantize,
    "glu_hadamard_quantize": _glu_hadamard_quantize,
    "head_hadamard_quantize": _head_hadamard_quantize,
    "linear_int4": _linear_int4,
    "prepack_int4": _prepack_int4,
    "unprepack_int4": _unprepack_int4,
    "rope_hadamard_kv_append": _attend,
    "attention": _attend,
}
OPS = tuple(_FAKES)
"""Every op of the library."""

_load()
Tape = importlib.import_module("quarot._C").Tape
"""Kernel calls on the CPU, to make again (csrc/ops/tape.h)."""
_fallbacks = torch.library.Library("quarot", "IMPL")
for _op, _fake in _FAKES.items():
    torch.library.register_fake(f"quarot::{_op}")(_fake)
    _fallbacks.impl(_op, _fallback(_op), "CompositeExplicitAutograd")
