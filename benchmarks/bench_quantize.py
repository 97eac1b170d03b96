"""The quantizers against a copy of the same bytes and the unfused sequence in torch.

Bound: memory; each input element is read once, each code written once. Two kinds of cases: rows
enough to be cold (`COLD_BYTES`), and few rows, as nodes of a graph that stands for a decode step.

    python -m pytest -s benchmarks/bench_quantize.py      (make bench runs all)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common import COLD_BYTES, DEVICES, Case, measure, node_seconds
from quarot import ops
from quarot.ops import reference

# Widths of Llama-3-8B and its MLP (28·512), of Llama-2-7B's MLP (172·64), of Llama-3-70B and its
# MLP.
SIZES = {"cuda": [4096, 8192, 11008, 14336, 28672], "cpu": [4096, 14336]}
# Heads of HEAD_DIM: 12, 28 (Qwen2-1.5B and 7B), 32, 40 (Llama-2-13B), 64.
HEAD_SIZES = {"cuda": [1536, 3584, 4096, 5120, 8192], "cpu": [4096, 5120]}
FEW_ROWS = {"cuda": [1, 16, 256, 2048], "cpu": [1, 16]}
HEAD_DIM = 128
SECONDS = {"cuda": 0.01, "cpu": 0.1}

# name -> (elements read for each code, the op on x [rows, that many * n]).
OPS: dict[str, tuple[int, Callable[..., reference.Quantized]]] = {
    "quantize": (1, lambda f, x, w, **o: f.quantize(x, **o)),
    "rmsnorm_quantize": (1, lambda f, x, w, **o: f.rmsnorm_quantize(x, w, **o)),
    "hadamard_quantize": (1, lambda f, x, w, **o: f.hadamard_quantize(x, **o)),
    "glu_hadamard_quantize": (2, lambda f, x, w, **o: f.glu_hadamard_quantize(x, size=None, **o)),
    "head_hadamard_quantize": (
        1,
        lambda f, x, w, **o: f.head_hadamard_quantize(x.unflatten(-1, (-1, HEAD_DIM)), None, **o),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {},
    "packed": {"packed": True},
    "asymmetric": {"symmetric": False},
    "g128": {"group": 128},
    "g64": {"group": 64},
}
# (query heads, key heads, head_dim): Llama-3-8B, Llama-2-7B, SmolLM2-135M.
HEADS = [(32, 8, 128), (32, 32, 128), (9, 3, 64)]


def on_devices(sizes: dict[str, list[int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("device", "n"), [(d, n) for d in DEVICES for n in sizes[d]])


def _random(device: str, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=generator)


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def sizes(device: str, name: str) -> list[int]:
    return (HEAD_SIZES if name == "head_hadamard_quantize" else SIZES)[device]


MANY = [
    (device, n, options, name)
    for device in DEVICES
    for name in OPS
    for n in sizes(device, name)
    for options in OPTIONS
    if device == "cuda" or n == 4096 or options == "int8"
]
FEW = [
    (device, n, rows, name)
    for device in DEVICES
    for name in OPS
    for n in sizes(device, name)
    for rows in FEW_ROWS[device]
]


@pytest.mark.parametrize(("device", "n", "options", "name"), MANY)
def test_many_rows(
    report: Callable[[str, Case], None], device: str, n: int, options: str, name: str
) -> None:
    # The unfused sequence takes ten times as long: not for all.
    unfused = options == "int8" and (device == "cuda" or n == 4096)
    rows = COLD_BYTES[device] // (OPS[name][0] * n * 2)
    _run(report, device, name, rows, n, options, unfused=unfused)


@pytest.mark.parametrize(("device", "n", "rows", "name"), FEW)
def test_few_rows(
    report: Callable[[str, Case], None], device: str, n: int, rows: int, name: str
) -> None:
    _run(report, device, name, rows, n, "int8", unfused=False, few=True)


def _run(
    report: Callable[[str, Case], None],
    device: str,
    name: str,
    rows: int,
    n: int,
    options: str,
    *,
    unfused: bool,
    few: bool = False,
) -> None:
    inputs, op = OPS[name]
    x, weight = _random(device, rows, inputs * n), _random(device, n)
    settings = {"bits": 4, "clip": 0.9, **OPTIONS[options]}

    def run(module: Any = ops, rows: Tensor = x) -> reference.Quantized:
        return op(module, rows, weight, **settings)

    _check(run(rows=x[:16]), run(reference, x[:16]), f"{name} {n}")
    case = measure(
        name,
        f"{rows} x {n} {options}",
        run,
        device=device,
        moved=x.nbytes + _bytes(run()) + (weight.nbytes if name == "rmsnorm_quantize" else 0),
        baselines={"torch": lambda: run(reference)} if unfused else {},
        sizes={"rows": rows, "n": n, "few": int(few)},
        seconds=SECONDS[device],
        **({"timer": node_seconds} if few else {}),
    )
    report(device, case)


def _check(actual: reference.Quantized, expected: reference.Quantized, what: str) -> None:
    difference = _codes(actual[0]) - _codes(expected[0])
    if difference.abs().max() > 1 or difference.count_nonzero() > 1e-3 * difference.numel():
        raise AssertionError(f"{what}: codes differ from the reference's")


def _codes(q: Tensor) -> Tensor:
    return (ops.unpack_int4(q) if q.dtype == torch.uint8 else q).int()


@pytest.mark.parametrize("name", ["dequantize", "pack_int4", "unpack_int4"])
@on_devices({"cuda": [4096, 14336], "cpu": [4096]})
def test_codes(report: Callable[[str, Case], None], device: str, n: int, name: str) -> None:
    x = _random(device, COLD_BYTES[device] // (2 * n), n)
    codes, scale, _ = ops.quantize(x)
    packed = ops.pack_int4(codes)
    run: Callable[[Any], Tensor] = {
        "dequantize": lambda f: f.dequantize(packed, scale, dtype=torch.bfloat16),
        "pack_int4": lambda f: f.pack_int4(codes),
        "unpack_int4": lambda f: f.unpack_int4(packed),
    }[name]
    read = {"dequantize": [packed, scale], "pack_int4": [codes], "unpack_int4": [packed]}[name]
    if not torch.equal(run(ops), run(reference)):
        raise AssertionError(f"{name}: differs from the reference")
    case = measure(
        name,
        f"{len(x)} x {n}",
        lambda: run(ops),
        device=device,
        moved=_bytes([*read, run(ops)]),
        baselines={"torch": lambda: run(reference)},
        sizes={"rows": len(x), "n": n, "few": 0},
        seconds=SECONDS[device],
    )
    report(device, case)


@pytest.mark.parametrize("tokens", ["1 x 1", "16 x 1", "8 x many"])
@pytest.mark.parametrize(
    ("device", "heads"),
    [(d, heads) for d in DEVICES for heads in HEADS[: 1 if d == "cpu" else None]],
    ids=str,
)
def test_kv_append(
    report: Callable[[str, Case], None], device: str, heads: tuple[int, int, int], tokens: str
) -> None:
    query_heads, key_heads, dim = heads
    batch, few = int(tokens.split()[0]), not tokens.endswith("many")
    width = (query_heads + 2 * key_heads) * dim
    seq = 1 if few else COLD_BYTES[device] // (batch * width * 2)
    parts = _random(device, batch, seq, width).split(
        [query_heads * dim, key_heads * dim, key_heads * dim], -1
    )
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in parts)
    angles = _random(device, 1, seq, dim)
    start = torch.zeros(batch, dtype=torch.int32, device=device)

    def new_cache() -> list[Tensor]:
        half = [
            torch.zeros(batch, key_heads, seq, dim // 2, dtype=torch.uint8, device=device),
            torch.zeros(batch, key_heads, seq, dtype=torch.float16, device=device),
            torch.zeros(batch, key_heads, seq, dtype=torch.uint8, device=device),
        ]
        return [*half, *(t.clone() for t in half)]

    cache = new_cache()

    cos, sin = angles.cos(), angles.sin()

    def append(module: Any = ops, cache: list[Tensor] = cache) -> Tensor:
        return module.rope_hadamard_kv_append(q, k, v, cos, sin, *cache, start, bits=4, size=dim)

    out, expected = append(), new_cache()
    append(reference, expected)
    for codes in (0, 3):
        apart = (cache[codes] != expected[codes]).float().mean()
        if apart > 2e-3:
            raise AssertionError(f"rope_hadamard_kv_append: {apart:.1%} of codes differ")
    case = measure(
        "rope_hadamard_kv_append",
        f"{batch} x {seq} heads {query_heads}/{key_heads} x {dim}",
        append,
        device=device,
        moved=_bytes([q, k, v, cos, sin, out, *cache]),
        baselines={} if few else {"torch": lambda: append(reference)},
        sizes={"rows": batch * seq, "n": width, "few": int(few)},
        seconds=SECONDS[device],
        **({"timer": node_seconds} if few else {}),
    )
    report(device, case)
