"""ops.linear_int4, from a decode step to a prompt, against torch's products of the same shape.

Bound: few tokens, memory (the int4 weights are read once); many, the int8 tensor cores. The weights
rotate through copies that exceed the last-level cache, as those of a model's layers do. On a GPU,
calls are replayed from a CUDA graph, so that the host's time is not measured. "% of copy" compares
with the rate of one large copy, reads and writes counted: a copy of a small matrix is mostly the
time that its launch takes, and no bound.

Taking turns of milliseconds, all run at about the clock that the power limit leaves to their mix: a
kernel that needs less energy than the others lends them its share. `sustained` is each on its own,
after some tenths of a second at its own clock, for large matrices and many tokens.

    python -m pytest -s benchmarks/bench_linear_int4.py      (make bench runs all)

What the kernel for many tokens plans with, plan_linear_int4.cu measures beside this.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common import COLD_BYTES, DEVICES, Case, median_seconds
from quarot import ops
from quarot.ops import reference

# Output and input channels of each linear of a decoder layer, q|k|v and gate|up fused.
MODELS = {
    "Llama-2-7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "Llama-2-13B": [(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    "Llama-2-70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "Llama-3-8B": [(6144, 4096), (28672, 4096), (4096, 14336)],
}
SHAPES = {
    "cuda": [(model, *shape) for model, shapes in MODELS.items() for shape in shapes],
    "cpu": [("Llama-2-7B", 4096, 4096)],
}
TOKENS = {"cuda": [2**i for i in range(14)], "cpu": [1, 16, 256]}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
GROUPS = (64, 128)  # columns; compared with a scale a channel
GROUPED_TOKENS = (1, 16, 64, 256, 2048)
RESIDUAL_TOKENS = (1, 2048)
# torch's int4 kernel is made for few tokens; _int_mm refuses 16 and fewer.
MOST_TOKENS_INT4PACK = 64
LEAST_TOKENS_INT8 = 17

REPLAYS = 5
REPLAY_SECONDS = 5e-3  # of one replay, about
MAX_CALLS = 64  # of one replay

SUSTAINED_BYTES = 50e6  # of int4 weights, at least
SUSTAINED_TOKENS = (256, 2048)
SUSTAINED_PEERS = ("ours", "bf16", "fp8")
SUSTAINED_SECONDS = 0.3  # before it is timed, and timed


@dataclasses.dataclass(frozen=True)
class LinearCase(Case):
    """A case with its rate of multiplications and additions.

    sustained: name -> microseconds of a call of it, if only that runs.
    """

    tops: float = 0.0
    sustained: dict[str, float] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """Return the case as one line of a table."""
        alone = "  ".join(f"{us:.1f} µs {name}" for name, us in self.sustained.items())
        return f"{self.tops:7.1f} TOPS | {super().line()}{' | sustained ' if alone else ''}{alone}"


@pytest.mark.parametrize(
    ("device", "model", "n", "k"),
    [(device, *shape) for device in DEVICES for shape in SHAPES[device]],
)
def test_linear_int4(
    report: Callable[[str, Case], None], device: str, model: str, n: int, k: int
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randint(
        0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator
    )
    scales = {
        group: torch.rand(n, k // group, device=device, generator=generator) / k
        for group in (k, *GROUPS)
    }
    weights = _cold(ops.prepack_int4(packed), device)
    peers = _peers(n, k, device, generator)
    for m in TOKENS[device]:
        x = torch.randint(-8, 8, (m, k), device=device, generator=generator).to(torch.int8)
        x_scale = torch.rand(m, device=device, generator=generator)

        def run(
            w: Tensor,
            group: int,
            x: Tensor = x,
            x_scale: Tensor = x_scale,
            residual: Tensor | None = None,
        ) -> Tensor:
            return ops.linear_int4(
                x, x_scale, None, w, scales[group], residual=residual, out_dtype=DTYPE[device]
            )

        verify(run(weights[0], k), x, x_scale, packed, scales[k])
        others = {name: peer(m) for name, peer in peers.items()}
        if m in GROUPED_TOKENS:
            for group in GROUPS:
                others[f"ours, g{group}"] = [lambda w=w, f=run, g=group: f(w, g) for w in weights]
        if m in RESIDUAL_TOKENS:
            residual = torch.randn(m, n, device=device, generator=generator).to(DTYPE[device])
            others["ours, residual"] = [
                lambda w=w, f=run, r=residual: f(w, k, residual=r) for w in weights
            ]
        ours = [lambda w=w, f=run: f(w, k) for w in weights]
        calls = {"ours": ours} | {name: c for name, c in others.items() if c}
        times = _seconds(calls, device)
        large = device == "cuda" and packed.nbytes >= SUSTAINED_BYTES and m in SUSTAINED_TOKENS
        sustained = {
            name: _sustained(calls[name]) * 1e6
            for name in SUSTAINED_PEERS
            if large and name in calls
        }
        seconds = times.pop("ours")
        moved = packed.nbytes + scales[k].nbytes + x.nbytes + x_scale.nbytes
        moved += m * n * DTYPE[device].itemsize
        case = LinearCase(
            name="linear_int4",
            shape=f"{model} {m} x {n} x {k}",
            us=seconds * 1e6,
            gbps=moved / seconds / 1e9,
            copy_share=moved / _copy_rate(device) / seconds,
            baselines={name: time / seconds for name, time in times.items()},
            sizes={"m": m, "n": n, "k": k},
            tops=2e-12 * m * n * k / seconds,
            sustained=sustained,
        )
        report(device, case)


def verify(y: Tensor, x: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor) -> None:
    """Compare some tokens and channels with the reference: bit by bit."""
    tokens, channels = slice(None, None, -(-len(y) // 32)), slice(None, None, 101)
    expected = reference.linear_int4(
        x[tokens], x_scale[tokens], None, packed[channels], w_scale[channels], out_dtype=y.dtype
    )
    if not torch.equal(y[tokens, channels], expected):
        raise AssertionError(f"{tuple(y.shape)}: differs from the reference")


def _peers(
    n: int, k: int, device: str, generator: torch.Generator
) -> dict[str, Callable[[int], list[Callable[[], object]]]]:
    """Return name -> (tokens -> calls, one a copy of the weights; none if it takes no such m)."""
    dtype = DTYPE[device]
    w = torch.randn(n, k, dtype=dtype, device=device, generator=generator)
    w_float = _cold(w, device)

    def activations(m: int) -> Tensor:
        return torch.randn(m, k, dtype=dtype, device=device, generator=generator)

    def in_float(m: int) -> list[Callable[[], object]]:
        x = activations(m)
        return [lambda w=w: functional.linear(x, w) for w in w_float]

    if device == "cpu":
        return {"fp32": in_float}
    w_int8 = _cold((8 * w).clamp(-128, 127).to(torch.int8), device)
    group = 128
    int4 = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator)
    w_int4 = _cold(torch.ops.aten._convert_weight_to_int4pack(int4, 8), device)
    scale_and_zero = torch.randn(k // group, n, 2, dtype=dtype, device=device, generator=generator)

    def in_int8(m: int) -> list[Callable[[], object]]:
        if m < LEAST_TOKENS_INT8:
            return []
        x = (8 * activations(m)).clamp(-128, 127).to(torch.int8)
        return [lambda w=w: torch._int_mm(x, w.T) for w in w_int8]

    def in_int4(m: int) -> list[Callable[[], object]]:
        if m > MOST_TOKENS_INT4PACK:
            return []
        x = activations(m)
        mm = torch.ops.aten._weight_int4pack_mm
        return [lambda w=w: mm(x, w, group, scale_and_zero) for w in w_int4]

    peers = {"bf16": in_float, "int8": in_int8, "W4A16": in_int4}
    if torch.cuda.get_device_capability() >= (8, 9):
        w_fp8 = _cold(w.to(torch.float8_e4m3fn), device)
        one = torch.ones((), device=device)

        def in_fp8(m: int) -> list[Callable[[], object]]:
            x = activations(m).to(torch.float8_e4m3fn)
            options = {"out_dtype": dtype, "use_fast_accum": True}
            return [lambda w=w: torch._scaled_mm(x, w.T, one, one, **options) for w in w_fp8]

        peers["fp8"] = in_fp8
    return peers


def _cold(x: Tensor, device: str) -> list[Tensor]:
    """Return copies of x that exceed the cache together."""
    return [x, *(x.clone() for _ in range(max(1, COLD_BYTES[device] // x.nbytes)))]


@functools.cache
def _copy_rate(device: str) -> float:
    """Return the bytes a second, read and written, of a copy that no cache holds."""
    source = torch.empty(COLD_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def _seconds(
    implementations: dict[str, list[Callable[[], object]]], device: str
) -> dict[str, float]:
    """Return the median time of a call of each; its calls take turns.

    The implementations take turns as well: a GPU that has rested is faster for some milliseconds.
    """
    if device == "cpu":
        turns = {name: itertools.cycle(calls) for name, calls in implementations.items()}
        return {
            name: median_seconds(lambda turn=turn: next(turn)(), device)
            for name, turn in turns.items()
        }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphs = {name: _graph(calls, stream) for name, calls in implementations.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(REPLAYS):
            for name, (graph, count) in graphs.items():
                times[name].append(_elapsed(graph.replay, stream) / count)
    torch.cuda.current_stream().wait_stream(stream)
    return {name: statistics.median(measured) for name, measured in times.items()}


def _sustained(calls: list[Callable[[], object]]) -> float:
    """Return the time of a call of many, after many others."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph, count = _graph(calls, stream)
        replays = max(1, int(SUSTAINED_SECONDS / _elapsed(graph.replay, stream)))
        for _ in range(2):  # the second time at its clock
            seconds = _elapsed(lambda: [graph.replay() for _ in range(replays)], stream)
    torch.cuda.current_stream().wait_stream(stream)
    return seconds / replays / count


def _graph(
    calls: list[Callable[[], object]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, int]:
    """Return a graph of some rounds of the calls, replayed once, and how many calls it has."""
    calls[0]()
    once = _elapsed(calls[0], stream)
    count = max(len(calls), min(MAX_CALLS, int(REPLAY_SECONDS / once)))
    if count * once > 4 * REPLAY_SECONDS:  # long calls are cold in any case
        count = max(2, int(4 * REPLAY_SECONDS / once))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    return graph, count


def _elapsed(run: Callable[[], object], stream: torch.cuda.Stream) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
