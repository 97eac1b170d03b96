"""ops.clip_search against its specification in plain torch.

Bound: arithmetic, 80 trials a weight; the share of a copy only shows how far from memory it is.

    python -m pytest -s benchmarks/bench_clip_search.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import DEVICES, Case, measure
from quarot import ops
from quarot.ops import reference

SHAPES = {"cpu": [(576, 576), (1536, 576)], "cuda": [(4096, 4096), (14336, 4096)]}


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize(
    ("device", "rows", "n"), [(device, *shape) for device in DEVICES for shape in SHAPES[device]]
)
def test_clip_search(
    report: Callable[[str, Case], None], device: str, rows: int, n: int, group: int
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(rows, n, device=device, generator=generator)

    chosen, specified = (module.clip_search(w, group=group) for module in (ops, reference))
    same = (chosen == specified).double().mean()  # sums of almost equal trials may change places
    assert same > 0.99, f"{same:.2%} of the scales are the specification's"

    case = measure(
        "clip_search",
        f"{rows} x {n} group {group}",
        lambda: ops.clip_search(w, group=group),
        device=device,
        moved=w.nbytes + chosen.nbytes,
        baselines={"torch": lambda: reference.clip_search(w, group=group)},
    )
    report(device, case)
