"""ops.quantize and the fused quantizers against a copy and the unfused sequence in torch.

Bound: memory; each input element is read once, each code written once.

    python -m pytest -s benchmarks/bench_quantize.py      (make bench runs all)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import COLD_BYTES, DEVICES, Case, measure
from quarot import ops
from quarot.ops import reference

# Widths of Llama-3-8B, Llama-2-7B's MLP (172·64), Llama-3-8B's MLP (28·512).
SIZES = [4096, 11008, 14336]
HEAD_DIM = 128

# name -> (elements read for each code, the op on x [rows, that many * n]).
OPS: dict[str, tuple[int, Callable[..., reference.Quantized]]] = {
    "quantize": (1, lambda f, x, **o: f.quantize(x, **o)),
    "rmsnorm_quantize": (1, lambda f, x, **o: f.rmsnorm_quantize(x, **o)),
    "hadamard_quantize": (1, lambda f, x, **o: f.hadamard_quantize(x, **o)),
    "glu_hadamard_quantize": (2, lambda f, x, **o: f.glu_hadamard_quantize(x, size=None, **o)),
    "head_hadamard_quantize": (
        1,
        lambda f, x, **o: f.head_hadamard_quantize(x.unflatten(-1, (-1, HEAD_DIM)), None, **o),
    ),
}
OPTIONS = {
    "int8": {},
    "packed": {"packed": True},
    "asymmetric": {"symmetric": False},
    "g128": {"group": 128},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_quantize(
    report: Callable[[str, Case], None], device: str, n: int, name: str, options: str
) -> None:
    inputs, op = OPS[name]
    dtype = torch.bfloat16
    rows = COLD_BYTES[device] // (inputs * n * dtype.itemsize)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs * n, dtype=dtype, device=device, generator=generator)
    settings = {"bits": 4, "clip": 0.9, **OPTIONS[options]}

    head = x[:64]
    actual, expected = op(ops, head, **settings), op(reference, head, **settings)
    difference = _codes(actual[0]) - _codes(expected[0])
    if difference.abs().max() > 1 or difference.count_nonzero() > 1e-3 * difference.numel():
        raise AssertionError(f"{name} {n}: codes differ from the reference's")

    case = measure(
        name,
        f"{rows} x {n} {options}",
        lambda: op(ops, x, **settings),
        device=device,
        moved=x.nbytes + sum(t.nbytes for t in op(ops, x, **settings) if t is not None),
        baselines={"torch": lambda: op(reference, x, **settings)},
    )
    report(device, case)


def _codes(q: torch.Tensor) -> torch.Tensor:
    return (ops.unpack_int4(q) if q.dtype == torch.uint8 else q).int()
