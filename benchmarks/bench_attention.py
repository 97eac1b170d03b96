"""ops.attention on the quantized cache against torch's SDPA on a bf16 cache of the same text.

Decode: bound by memory, the codes, scales and zeros of the keys and values seen, each read once;
"copy" moves as many bytes, reading half of them and writing half. CUDA cases are graphs that go
round several caches, so that neither the host's time nor the L2 counts. Prefill: bound by SDPA's
own arithmetic.

    python -m pytest -s benchmarks/bench_attention.py      (make bench runs all)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import COLD_BYTES, DEVICES, MIN_SECONDS, Case, check_error, measure
from quarot import ops
from quarot.ops import reference

# Of each timed thing: hundreds of replays. A case has four of them, and there are 30 cases.
SECONDS = 0.1

PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call: `ragged` lengths are spread evenly from a sixteenth of the context to all of it.

    `capacity`: the cache's, where it is more than the context, as in a decode step.
    """

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    queries: int = 1
    bits: int = 4
    dim: int = 128
    ragged: bool = False
    capacity: int = 0

    def __str__(self) -> str:
        parts = [f"B{self.batch} {self.heads}/{self.kv_heads} ctx {self.context}"]
        parts += [f"S{self.queries}"] * (self.queries > 1)
        parts += [f"int{self.bits}"] * (self.bits != 4) + [f"D{self.dim}"] * (self.dim != 128)
        parts += [f"of {self.capacity}"] * (self.capacity > 0) + ["ragged"] * self.ragged
        return " ".join(parts)

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def lengths(self, device: str) -> Tensor:
        shortest = self.context // 16 if self.ragged else self.context
        return torch.linspace(shortest, self.context, self.batch, device=device).int()


SHAPES = {
    "cuda": [
        *(Shape(1, context) for context in (1024, 2048, 8192, 32768, 131072)),
        *(Shape(1, 2048, capacity=capacity) for capacity in (4096, 32768)),
        *(Shape(16, context) for context in (4096, 8192, 32768)),
        Shape(64, 8192),
        Shape(40, 4096),
        Shape(1, 8192, kv_heads=32),
        Shape(16, 4096, kv_heads=32),
        Shape(16, 8192, heads=64),
        Shape(16, 8192, bits=8),
        Shape(16, 8192, queries=4),
        Shape(1, 8192, queries=8),
        *(Shape(16, 8192, dim=dim) for dim in (64, 96, 256)),
        Shape(16, 32768, ragged=True),
    ],
    "cpu": [Shape(1, 2048), Shape(1, 16384), Shape(8, 4096), Shape(1, 4096, kv_heads=32)],
}
PREFILL = [
    *(Shape(1, 2048, queries=2048, dim=dim) for dim in (64, 96, 128, 256)),
    Shape(4, 4096, queries=4096),
]

Cache = tuple[Tensor, ...]


def make(shape: Shape, device: str) -> tuple[Tensor, Cache]:
    """Return queries bf16 [B, S, H, D] and a random cache."""
    rows = (shape.batch, shape.kv_heads, max(shape.capacity, shape.context))

    def half() -> Cache:
        codes = (*rows, shape.dim * shape.bits // 8)
        return (
            torch.randint(0, 256, codes, dtype=torch.uint8, device=device),
            ((torch.rand(rows, device=device) + 0.5) * 2 / 2**shape.bits).half(),
            torch.randint(0, 2**shape.bits, rows, dtype=torch.uint8, device=device),
        )

    q = torch.randn(shape.batch, shape.queries, shape.heads, shape.dim, device=device)
    return q.bfloat16(), (*half(), *half())


def attend(shape: Shape, q: Tensor, cache: Cache, lengths: Tensor) -> Tensor:
    length = None if shape.ragged or shape.capacity else shape.context
    return ops.attention(q, *cache, lengths, bits=shape.bits, scale=shape.scale, length=length)


def verify(shape: Shape, q: Tensor, cache: Cache, lengths: Tensor) -> None:
    """Compare one head of the last sequence with float64."""
    if shape.queries > 64:  # the scores of all would not fit: the last ones see the most
        actual, q = attend(shape, q, cache, lengths)[:, -64:], q[:, -64:]
    else:
        actual = attend(shape, q, cache, lengths)
    one = [x[-1:, :1] for x in cache]
    query = q[-1, :, :1].transpose(0, 1)
    keys, values = (
        reference.dequantize_kv(*half, shape.context, shape.bits)[0] for half in (one[:3], one[3:])
    )
    seen = torch.ones(query.shape[1], shape.context, dtype=torch.bool, device=q.device)
    seen = seen.tril(shape.context - query.shape[1])
    exact = (query.double() @ keys.double().mT * shape.scale).masked_fill(~seen, -torch.inf)
    exact = exact.softmax(-1) @ values.double()
    other = functional.scaled_dot_product_attention(
        query, keys.bfloat16(), values.bfloat16(), attn_mask=seen, scale=shape.scale
    )
    check_error(actual[-1, :, :1].transpose(0, 1), exact, other, what=str(shape))


def captured(calls: list[Callable[[], object]], device: str) -> Callable[[], object]:
    """Return what runs all calls: on CUDA the replay of one graph."""

    def run() -> None:
        for call in calls:
            call()

    if device == "cpu":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peers(shape: Shape, device: str, count: int) -> dict[str, Callable[[], object]]:
    """Return `count` calls of torch's SDPA, on bf16 caches of all the context."""
    rows = (shape.batch, shape.kv_heads, shape.context, shape.dim)
    inputs = [
        [torch.randn(r, dtype=torch.bfloat16, device=device) for r in (rows, rows)]
        for _ in range(-(-count // 3))  # a bf16 cache has more than three times the bytes
    ]
    q = make(shape, device)[0].transpose(1, 2)

    def call(index: int) -> Tensor:
        return functional.scaled_dot_product_attention(
            q,
            *inputs[index % len(inputs)],
            is_causal=shape.queries == shape.context,
            scale=shape.scale,
            enable_gqa=shape.heads != shape.kv_heads,
        )

    calls = [lambda i=i: call(i) for i in range(count)]
    if device == "cpu":
        return {"sdpa": captured(calls, device)}
    found = {}
    for name, backend in PEERS.items():
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):  # not for every shape
            call(0)
            found[name] = captured(calls, device)
    return found


def rounds(shape: Shape, device: str) -> int:
    """Return how many caches make cold data."""
    return max(1, -(-COLD_BYTES[device] // cache_bytes(shape, shape.batch * shape.context)))


def cache_bytes(shape: Shape, tokens: int) -> int:
    """Return the bytes of keys and values of so many tokens: codes, scale and zero."""
    return 2 * shape.kv_heads * tokens * (shape.dim * shape.bits // 8 + 3)


CASES = [(device, shape) for device in DEVICES for shape in SHAPES[device]]


@pytest.mark.parametrize(("device", "shape"), CASES, ids=str)
def test_decode(report: Callable[[str, Case], None], device: str, shape: Shape) -> None:
    torch.manual_seed(0)
    lengths = shape.lengths(device)
    count = rounds(shape, device)
    inputs = [make(shape, device) for _ in range(count)]
    verify(shape, *inputs[0], lengths)
    calls = [lambda x=x: attend(shape, *x, lengths) for x in inputs]
    case = measure(
        "decode",
        str(shape),
        captured(calls, device),
        device=device,
        moved=count * cache_bytes(shape, int(lengths.sum())),
        baselines=peers(shape, device, count),
        seconds=SECONDS if device == "cuda" else MIN_SECONDS,
    )
    report(device, dataclasses.replace(case, us=case.us / count))


# With the device in their names, as decode's cases have it: `-k cuda` is for all of a device.
PREFILL_CASES = [("cuda", shape) for shape in PREFILL if "cuda" in DEVICES]


@pytest.mark.parametrize(("device", "shape"), PREFILL_CASES, ids=str)
def test_prefill(report: Callable[[str, Case], None], device: str, shape: Shape) -> None:
    torch.manual_seed(0)
    lengths = shape.lengths(device)
    q, cache = make(shape, device)
    verify(shape, q, cache, lengths)
    case = measure(
        "prefill",
        str(shape),
        captured([lambda: attend(shape, q, cache, lengths)], device),
        device=device,
        moved=2 * q.nbytes + cache_bytes(shape, shape.batch * shape.context),
        baselines=peers(shape, device, 1),
        seconds=SECONDS,
    )
    report(device, case)
