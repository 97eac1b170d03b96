"""Every instruction-set variant of the CPU kernels gives the same bits (CONTRIBUTING.md).

A variant is chosen once a process, so each runs in a subprocess with QUAROT_CPU_ISA and saves what
all ops return on the same seeded inputs; the files are compared with baseline's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import paged, random_cache
from quarot import ops

_C = pytest.importorskip("quarot._C", reason="the library is not built")

VARIANTS = ("avx2", "avx512", "amx")
QUANTIZERS = (
    {"bits": 4, "symmetric": True, "clip": 0.9},
    {"bits": 4, "symmetric": False, "clip": 1.0, "packed": True},
    {"bits": 8, "symmetric": False, "clip": 0.95, "group": 8},
)


def spawn(isa: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "QUAROT_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(isa: str, path: Path) -> None:
    """Save the results of a variant in a file, and check that it was the one that ran."""
    process = spawn(isa, path)
    assert process.returncode == 0, process.stdout
    assert process.stdout.split()[-1] == isa


def results() -> Iterator[tuple[str, Tensor | None]]:
    """Yield (name, tensor) of every op on CPU, for shapes with and without tails."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (56, 64, 576, 1536):
            name = f"{dtype} {n}"
            x = randn(5, n, dtype=dtype)
            x[1] *= 1e-3
            x[2, 3] = torch.nan
            gate_up = randn(5, 2 * n, dtype=dtype) * 4
            yield f"hadamard {name}", ops.hadamard(x)
            for i, options in enumerate(QUANTIZERS):
                outputs = {
                    "quantize": ops.quantize(x, **options),
                    "hadamard_quantize": ops.hadamard_quantize(x, **options),
                    "rmsnorm_quantize": ops.rmsnorm_quantize(x, randn(n), 1e-5, **options),
                    "head_hadamard_quantize": ops.head_hadamard_quantize(
                        x.reshape(5, 4, n // 4), None, **options
                    ),
                }
                for activation in ("silu", "gelu", "gelu_tanh"):
                    outputs[f"glu_hadamard_quantize {activation}"] = ops.glu_hadamard_quantize(
                        gate_up, activation, None, **options
                    )
                for op, output in outputs.items():
                    for j, tensor in enumerate(output):
                        yield f"{op} {name} {i} output {j}", tensor
                codes, scale, zero = outputs["quantize"]
                for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
                    yield (
                        f"dequantize {name} {i} {out_dtype}",
                        ops.dequantize(codes, scale, zero, dtype=out_dtype),
                    )
    codes = torch.randint(-8, 8, (7, 94), dtype=torch.int8, generator=generator)
    yield "pack_int4", ops.pack_int4(codes)
    yield "unpack_int4", ops.unpack_int4(ops.pack_int4(codes))
    for group in (0, 8):
        for norm in (2.4, 2.0, 1.5):
            yield (
                f"clip_search {norm} {group}",
                ops.clip_search(randn(9, 200), norm, group, randn(200).abs()),
            )
    yield from linear(randn, generator)
    for bits in (4, 8):
        for dim in (8, 24, 64, 80, 96, 128, 256):
            yield from appended(bits, dim, randn)
            yield from attention(bits, dim, randn)


def linear(
    randn: Callable[..., Tensor], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for m, n, k, groups in (
        (1, 33, 64, 1),
        (3, 17, 96, 3),
        (7, 80, 256, 4),
        (40, 48, 1536, 1),
        (140, 72, 2112, 1),
    ):
        weight = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
        w_scale = torch.rand(n, groups, generator=generator)
        w_sum = weight.reshape(n, groups, -1).sum(-1, dtype=torch.int32)
        w = ops.prepack_int4(ops.pack_int4(weight))
        yield f"prepack_int4 {n} {k}", w
        yield f"unprepack_int4 {n} {k}", ops.unprepack_int4(w, n, k)
        x, scale, zero = ops.quantize(randn(m, k), 8, symmetric=False)
        for dtype in (torch.float32, torch.bfloat16):
            yield (
                f"linear_int4 {m} {n} {k} {dtype}",
                ops.linear_int4(
                    x, scale, zero, w, w_scale, w_sum, randn(n), randn(m, n), out_dtype=dtype
                ),
            )

    # The usual end of a block: one group, no zero points, bf16.
    x, scale, _ = ops.quantize(randn(40, 1536).bfloat16(), 8)
    weight = torch.randint(-8, 8, (72, 1536), dtype=torch.int8, generator=generator)
    w, w_scale = ops.prepack_int4(ops.pack_int4(weight)), torch.rand(72, 1, generator=generator)
    for residual in (None, randn(40, 72, dtype=torch.bfloat16)):
        yield (
            f"linear_int4 {residual is None}",
            ops.linear_int4(
                x, scale, None, w, w_scale, residual=residual, out_dtype=torch.bfloat16
            ),
        )


def appended(bits: int, dim: int, randn: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A prompt and a token more, of heads that R3 transforms."""
    batch, heads, kv_heads, capacity = 2, 4, 2, 32
    torch.manual_seed(dim)
    cache = random_cache(batch, kv_heads, capacity, dim, bits, torch.device("cpu"))
    start = 0
    for tokens, dtype in ((21, torch.float32), (1, torch.bfloat16), (3, torch.float16)):
        q = randn(batch, tokens, heads, dim, dtype=dtype)
        k, v = (randn(batch, tokens, kv_heads, dim, dtype=dtype) for _ in range(2))
        angle = randn(batch, tokens, dim // 2).repeat(1, 1, 2)
        q = ops.rope_hadamard_kv_append(
            q, k, v, angle.cos(), angle.sin(), *cache,
            torch.full((batch,), start, dtype=torch.int32), bits=bits, size=None,
        )  # fmt: skip
        start += tokens
        yield f"rope {bits} {dim} {tokens}", q
    for i, tensor in enumerate(cache):
        yield f"cache {bits} {dim} {i}", tensor


def attention(bits: int, dim: int, randn: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Decode, also so long that keys are split, a few tokens, and a prompt of several blocks."""
    heads, kv_heads, capacity = 4, 2, 1200
    torch.manual_seed(dim)
    cache = random_cache(2, kv_heads, capacity, dim, bits, torch.device("cpu"))
    cache[1][0, 0, 7] = torch.nan
    for seq, longest, dtype in (
        (1, 1190, torch.float32),
        (1, 70, torch.bfloat16),
        (4, 90, torch.float32),
        (40, 130, torch.float16),
    ):
        lengths = torch.tensor([longest, 33], dtype=torch.int32)
        q = randn(2, seq, heads, dim, dtype=dtype)
        mask = randn(2, 1, seq, longest) > -0.5
        blocks, table = paged(cache, 16, lengths)
        for name, held, options in (
            ("plain", cache, {}),
            ("mask", cache, {"mask": mask}),
            ("mask a head", cache, {"mask": randn(2, heads, seq, longest) > -0.5}),
            ("window", cache, {"window": 19}),
            ("paged", blocks, {"block_table": table, "mask": mask}),
            ("paged window", blocks, {"block_table": table, "window": 600}),
        ):
            yield (
                f"attention {bits} {dim} {seq} {longest} {name}",
                ops.attention(q, *held, lengths, bits=bits, scale=dim**-0.5, **options),
            )
    # A prompt of bf16 queries: by tiles, where the processor has them, whatever the variant.
    q = randn(2, 128, heads, dim, dtype=torch.bfloat16)
    lengths = torch.full((2,), 128, dtype=torch.int32)
    cache = random_cache(2, kv_heads, 128, dim, bits, torch.device("cpu"))
    yield (
        f"attention {bits} {dim} prompt",
        ops.attention(q, *cache, lengths, bits=bits, scale=0.01, length=128),
    )


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor | None]:
    path = tmp_path_factory.mktemp("isa") / "baseline.pt"
    run("baseline", path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("isa", VARIANTS)
def test_variant_equals_baseline(
    isa: str, baseline: dict[str, Tensor | None], tmp_path: Path
) -> None:
    if isa not in _C.cpu_isas:
        pytest.skip(f"this processor or build has no {isa}")
    run(isa, tmp_path / "variant.pt")
    variant = torch.load(tmp_path / "variant.pt", weights_only=True)
    assert variant.keys() == baseline.keys() and len(variant) > 100
    for name, expected in baseline.items():
        actual = variant[name]
        if expected is None or actual is None:
            assert actual is expected, name
            continue
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
        same = actual.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
        assert same.all(), f"{name}: {(~same).sum()} bytes of {same.numel()} differ"


def test_unknown_variant_is_an_error_of_the_import(tmp_path: Path) -> None:
    process = spawn("sse9", tmp_path / "never.pt")
    assert process.returncode != 0
    assert "QUAROT_CPU_ISA must be baseline, avx2, avx512 or amx; got 'sse9'" in process.stdout


if __name__ == "__main__":
    torch.save(dict(results()), sys.argv[1])
    print(_C.cpu_isa)
