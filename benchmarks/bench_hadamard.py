"""ops.hadamard against a copy of the same bytes, plain torch, and Dao's fast_hadamard_transform.

Bound: memory; each element is read and written once. Two kinds of cases: rows enough to be cold
(`COLD_BYTES`), over all sizes; and few rows, as nodes of a graph that stands for a decode step.
plot.py draws the first kind.

    python -m pytest -s benchmarks/bench_hadamard.py      (make bench runs all)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import COLD_BYTES, DEVICES, Case, check_error, measure, node_seconds
from quarot import hadamard, ops

try:  # the peer; only where somebody installed it
    import fast_hadamard_transform.fast_hadamard_transform_interface as dao
except ImportError:
    dao = None

POWERS = [1 << p for p in range(7, 17)]
# Widths of models and of their MLPs: 576 = 36·16 and 1536 = 12·128 (SmolLM2-135M), 5120 = 20·256
# and 13824 = 108·128 (Llama-2-13B), 11008 = 172·64 (7B), 14336 = 28·512 (Llama-3-8B), 28672 (70B),
# 18944 = 148·128 (Qwen2-7B), 29568 = 7 blocks of 132·32 (72B).
MODELS = [576, 1536, 5120, 11008, 12288, 13824, 14336, 18944, 28672, 29568]
SIZES = {"cuda": POWERS + MODELS, "cpu": [128, 1024, 4096, 16384, 576, 5120, 11008, 14336]}
FEW_SIZES = {"cuda": SIZES["cuda"], "cpu": [4096, 14336]}
FEW_ROWS = {"cuda": [1, 16, 256, 2048], "cpu": [1, 16]}
SECONDS = {"cuda": 0.01, "cpu": 0.1}

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MANY = [(d, n, dtype) for d in DEVICES for n in SIZES[d] for dtype in (BF16, F32)]
MANY += [("cuda", n, F16) for n in (4096, 14336) if "cuda" in DEVICES]
FEW = [(d, n, rows) for d in DEVICES for n in FEW_SIZES[d] for rows in FEW_ROWS[d]]


@pytest.mark.parametrize(("device", "n", "dtype"), MANY)
def test_many_rows(
    report: Callable[[str, Case], None], device: str, n: int, dtype: torch.dtype
) -> None:
    _run(report, device, COLD_BYTES[device] // (n * dtype.itemsize), n, dtype)


@pytest.mark.parametrize(("device", "n", "rows"), FEW)
def test_few_rows(report: Callable[[str, Case], None], device: str, n: int, rows: int) -> None:
    _run(report, device, rows, n, BF16, few=True)


def _run(
    report: Callable[[str, Case], None],
    device: str,
    rows: int,
    n: int,
    dtype: torch.dtype,
    *,
    few: bool = False,
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, n, dtype=dtype, device=device, generator=generator)
    size = hadamard.split(n)[0]

    head = x[:16]
    expected = hadamard.transform(head.double(), size)
    check_error(
        ops.hadamard(head, size), expected, hadamard.transform(head, size), what=f"hadamard {n}"
    )

    baselines: dict[str, Callable[[], object]] = {}
    if not few:
        baselines["torch"] = lambda: hadamard.transform(x, size)
    if device == "cuda" and (peer := _dao(x, size)) is not None:
        baselines["dao"] = peer
    name = str(dtype).removeprefix("torch.")
    case = measure(
        "hadamard",
        f"{rows} x {n} {name}",
        lambda: ops.hadamard(x, size),
        device=device,
        moved=2 * x.nbytes,
        baselines=baselines,
        sizes={"rows": rows, "n": n, "few": int(few)},
        seconds=SECONDS[device],
        **({"timer": node_seconds} if few else {}),
    )
    report(device, case)


def _dao(x: torch.Tensor, size: int) -> Callable[[], object] | None:
    """Return the peer's transform of x's whole rows, if it has one of this size."""
    n = x.shape[-1]
    order = hadamard.split(n)[1]
    if dao is None or size != n or n // order > (1024 if order > 1 else 32768):
        return None
    name = "hadamard_transform" + ("" if order == 1 else f"_{order}N")
    function = getattr(dao, name, None)
    return None if function is None else lambda: function(x, n**-0.5)
