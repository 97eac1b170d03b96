"""What limits linear_int4's two main CUDA kernels: ncu's counters, as results/<device>/*.json.

Needs ncu (CUDA toolkit) and its leave to read counters. Each kernel runs once, on weights that no
cache holds, at the clock that the GPU chooses.

    python benchmarks/profile_linear_int4.py
"""

from __future__ import annotations

import csv
import subprocess
import sys

import torch

from common import COLD_BYTES, write_results
from quarot import ops

# Tokens, output and input channels: a decode step and a prompt of Llama-3-8B's gate|up.
SHAPES = [(1, 28672, 4096), (2048, 28672, 4096)]
KERNELS = "regex:mma_kernel|prefill_kernel"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "cycles": "sm__cycles_active.avg",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issued_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "memory_read_bytes": "dram__bytes_read.sum",
    "cycles_between_issues": "smsp__average_warp_latency_per_inst_issued.ratio",
    "waiting_for_loads": STALLED.format("long_scoreboard"),
    "waiting_for_barriers": STALLED.format("barrier"),
    "waiting_for_wgmma": STALLED.format("gmma"),
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
}


def run() -> None:
    """Run the shapes, each once."""
    for m, n, k in SHAPES:
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        weights, scale = ops.prepack_int4(packed), torch.rand(n, 1, device="cuda")
        x = torch.randint(-8, 8, (m, k), dtype=torch.int8, device="cuda")
        torch.zeros(COLD_BYTES["cuda"], dtype=torch.uint8, device="cuda")
        x_scale = torch.rand(m, device="cuda")
        ops.linear_int4(x, x_scale, None, weights, scale, out_dtype=torch.bfloat16)
    torch.cuda.synchronize()


def profile() -> list[dict[str, object]]:
    """Return a row of counters a shape."""
    command = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--kernel-name", KERNELS, "--metrics", ",".join(COUNTERS.values())]
    command += [sys.executable, __file__, "--run"]
    ncu = subprocess.run(command, capture_output=True, text=True)
    printed = ncu.stdout
    if ncu.returncode:
        raise RuntimeError(f"ncu failed ({ncu.returncode}): {(printed + ncu.stderr)[-2000:]}")
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        kernels[row["ID"]][row["Metric Name"]] = row["Metric Value"].replace(",", "")
    if len(kernels) != len(SHAPES):
        raise RuntimeError(f"ncu saw {len(kernels)} kernels, not {len(SHAPES)}: {printed[-2000:]}")
    rows: list[dict[str, object]] = []
    for (m, n, k), found in zip(SHAPES, kernels.values(), strict=True):
        values = {name: float(found[counter]) for name, counter in COUNTERS.items()}
        values["us"] /= 1e3
        sizes = {"m": m, "n": n, "k": k}
        rows.append({"kernel": found["kernel"], "sizes": sizes, **values})
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == ["--run"]:
        run()
    else:
        rows = profile()
        for row in rows:
            print(row)
        print(f"wrote {write_results('linear_int4_ncu', 'cuda', rows)}")
