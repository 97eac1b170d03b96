"""ops.hadamard against a copy of the same bytes, plain torch, and Dao's fast_hadamard_transform.

Bound: memory; each element is read and written once.

    python -m pytest -s benchmarks/bench_hadamard.py      (make bench runs all)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import COLD_BYTES, DEVICES, Case, check_error, measure
from quarot import hadamard, ops

try:  # the peer; only where somebody installed it
    from fast_hadamard_transform import hadamard_transform as dao
except ImportError:
    dao = None

# Powers of two, and widths of models: 576 = 36·16 (SmolLM2-135M), 5120 = 20·256 (Llama-2-13B),
# 11008 = 172·64 (Llama-2-7B's MLP), 14336 = 28·512 (Llama-3-8B's MLP).
SIZES = [128, 1024, 4096, 16384, 576, 5120, 11008, 14336]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_hadamard(
    report: Callable[[str, Case], None], device: str, n: int, dtype: torch.dtype
) -> None:
    rows = COLD_BYTES[device] // (n * dtype.itemsize)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, n, dtype=dtype, device=device, generator=generator)

    head = x[:64]
    expected = hadamard.transform(head.double())
    check_error(ops.hadamard(head), expected, hadamard.transform(head), what=f"hadamard {n}")

    baselines: dict[str, Callable[[], object]] = {"torch": lambda: hadamard.transform(x)}
    if dao is not None and device == "cuda" and n & (n - 1) == 0:
        baselines["dao"] = lambda: dao(x, n**-0.5)
    case = measure(
        "hadamard",
        f"{rows} x {n} {str(dtype).removeprefix('torch.')}",
        lambda: ops.hadamard(x),
        device=device,
        moved=2 * x.nbytes,
        baselines=baselines,
    )
    report(device, case)
