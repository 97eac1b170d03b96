"""What every benchmark shares: timing, the line a case prints, and the JSON it leaves.

A benchmark verifies first, then times. Times are only comparable within one run on one machine, so
a case also carries two ratios measured beside it: to a copy of the same bytes (the bound of an op
that reads and writes each once), and to a baseline that does the same work.

    shape | µs | GB/s | % of copy | x baseline
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from quarot import _C, __version__

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

# Timed runs of a case: the median of at least this many, and of as many as fill the time. A median
# of few CPU runs moves by some per cent; a case must not take longer than a reader's patience.
MIN_RUNS = 5
MIN_SECONDS = 0.5

# Clock cycles of a GPU, about 0.1 ms, in which the host gets ahead of it: an op's checks,
# allocations and launch take tens of µs, which would count as the kernel's.
HEAD_START = 200_000

# Ops of a graph that stands for a decode step.
NODES = 50

# Bytes of a case's input. Input and output together are cold if they are 4x what a last-level cache
# holds: 50 MB of L2 on an H200, and tens of MB of L3 on a CPU (more on large servers: there the
# ratio to the copy still holds, as it is measured on buffers of the same size).
COLD_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}

# glibc gives a large block back to the system when it is freed, and the next output's allocation
# pays for zeroed pages again: more than the work itself. These two settings (mallopt(3)) keep it.
if sys.platform == "linux":
    _M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(_M_MMAP_MAX, 0)
    ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

LOAD = os.getloadavg()[0]
"""Processes that ran before us, averaged over a minute: times of a busy machine say little."""

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured case.

    Args:
        name: what was run;  shape: its sizes and dtype, as printed.
        us: median time in microseconds.
        gbps: bytes read and written once, by that time, in GB/s; None where they say nothing.
        copy_share: the time of a copy of the same bytes by this time (1 = at the bound), or None.
        baselines: name -> that implementation's time by this time (2 = we are twice as fast).
        sizes: the shape in numbers, for plots.
    """

    name: str
    shape: str
    us: float
    gbps: float | None
    copy_share: float | None
    baselines: dict[str, float]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """Return the case as one line of a table."""
        others = "  ".join(f"{x:5.2f}x {name}" for name, x in self.baselines.items())
        bytes_ = ""
        if self.gbps is not None and self.copy_share is not None:
            bytes_ = f"{self.gbps:7.1f} GB/s | {self.copy_share:6.1%} of copy | "
        return f"{self.shape:32} | {self.us:9.1f} µs | {bytes_}{others}"


def median_seconds(run: Callable[[], object], device: str, seconds: float = MIN_SECONDS) -> float:
    """Return the median time of `run()` on a device, warmed up, of as many as fill `seconds`."""
    times: list[float] = []
    timer = _cuda_seconds if device == "cuda" else _cpu_seconds
    timer(run)
    timer(run)
    while len(times) < MIN_RUNS or sum(times) < seconds:
        times.append(timer(run))
    return statistics.median(times)


def node_seconds(run: Callable[[], object], device: str, seconds: float = MIN_SECONDS) -> float:
    """Return the time of one `run()` among `NODES`, each after the other: a decode step's ops.

    On a GPU they are the nodes of a CUDA graph, so that the host's time does not count; the data
    stay in the L2.
    """
    if device == "cuda":
        run()  # what must not happen in a capture: the factor's copy, the kernels' loading
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(NODES):
                run()
        return median_seconds(graph.replay, device, seconds) / NODES
    return median_seconds(run, device, seconds)


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)  # else the first launch would wait for the host, in our time
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    name: str,
    shape: str,
    run: Callable[[], object],
    *,
    device: str,
    moved: int,
    baselines: dict[str, Callable[[], object]],
    sizes: dict[str, int] | None = None,
    timer: Callable[[Callable[[], object], str, float], float] = median_seconds,
    seconds: float = MIN_SECONDS,
) -> Case:
    """Time `run`, a copy of the same bytes, and the baselines, one after the other.

    Args:
        name, shape, sizes: as in `Case`.
        run: the work, on data of at least `COLD_BYTES` unless the case is about less.
        device: "cpu" or "cuda".
        moved: bytes that the work reads plus those it writes, each counted once.
        baselines: other implementations of the same work.
        timer: `median_seconds` or `node_seconds`;  seconds: passed to it.
    """
    half = torch.empty(moved // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(half)
    copy = timer(lambda: target.copy_(half), device, seconds)
    ours = timer(run, device, seconds)
    others = {other: timer(f, device, seconds) / ours for other, f in baselines.items()}
    return Case(name, shape, ours * 1e6, moved / ours / 1e9, copy / ours, others, sizes or {})


def check_error(
    actual: Tensor, expected: Tensor, other: Tensor, *, factor: float = 2.0, what: str
) -> None:
    """Raise unless `actual` is as near to `expected` (float64) as `factor` times `other` is.

    `other` is plain torch's result in the same dtype: a tolerance that calibrates itself. One unit
    in the last place of the largest entry is allowed on top.
    """
    ulp = torch.finfo(actual.dtype).eps * expected.abs().max()
    error = (actual.double() - expected).abs().max()
    allowed = factor * (other.double() - expected).abs().max() + ulp
    if not error <= allowed:
        raise AssertionError(f"{what}: error {error:.3e}, allowed {allowed:.3e}")


def device_name(device: str) -> str:
    """Return the device's name as its vendor writes it; for a CPU with the instruction set used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else platform.machine()} ({_C.cpu_isa})"


def write_results(
    family: str, device: str, cases: Sequence[dict[str, Any]], **facts: object
) -> Path:
    """Write results/<device>/<family>.json, with more `facts` about all cases; return its path."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "family": family,
        "device": device_name(device),
        "load_before": LOAD,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "quarot": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        **facts,
        "cases": list(cases),
    }
    path = folder / f"{family}.json"
    text = json.dumps(_rounded(report), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
    return path


def _commit() -> str | None:
    """Return the commit, with -dirty if sources differ from it; None outside a git checkout.

    QUAROT_COMMIT names it for a copy of the sources without their history.
    """
    if named := os.environ.get("QUAROT_COMMIT"):
        return named
    command = ["git", "-C", os.fspath(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _rounded(value: object) -> object:
    """Keep four digits: more are noise, and would make every run's file differ everywhere."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
