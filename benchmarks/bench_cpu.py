"""What a CPU has to beat, on two threads: torch's int4, bf16 and int8 products, SDPA, a plain copy,
transformers' bf16 model and, where it is installed, llama.cpp's Python package.

Each case runs beside its peers. "warm" weights stay in the cache, "cold" ones rotate through copies
of four times the last-level cache; "read" sums the same bytes. The model has SmolLM2-135M's shape
and random weights; llama.cpp needs a file: QUAROT_BENCH_GGUF.

    OMP_NUM_THREADS=2 taskset -c 2,3 python -m pytest -s benchmarks/bench_cpu.py
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import quarot
from common import Case, measure
from quarot import ops

BF16 = torch.bfloat16
SECONDS = 0.2
L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
GROUP = 32  # of torch's int4 weights: llama.cpp's, and torch's finest

# (tokens, output channels, input channels, cold)
LINEARS = [(m, 4096, 4096, False) for m in (1, 4, 16, 128, 512)]
LINEARS += [(1, 14336, 4096, True)]
# SmolLM2-135M: q|k|v, o, gate|up, down.
LINEARS += [(m, n, k, False) for m in (1, 512) for n, k in
            ((960, 576), (576, 576), (3072, 576), (576, 1536))]  # fmt: skip
MOST_TOKENS_INT4PACK = 16
LEAST_TOKENS_INT8 = 17  # _int_mm's own limit
WIDTHS = [576, 1536, 4096, 8192, 11008, 14336]
# query heads, key heads, head_dim, context, queries
ATTENTION = [(9, 3, 64, 4096, 1), (32, 8, 128, 4096, 1), (9, 3, 64, 512, 512)]
PROMPT, NEW = 512, 64
RUNS = 3

Report = Callable[[str, Case], None]


def turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return what runs the next call each time."""
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()


def copies(x: Tensor, cold: bool) -> list[Tensor]:
    size = L3.read_text().strip() if L3.exists() else "64M"
    cache = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return [x, *(x.clone() for _ in range(4 * cache // x.nbytes if cold else 0))]


@pytest.mark.parametrize(("m", "n", "k", "cold"), LINEARS)
def test_linear_int4(report: Report, m: int, n: int, k: int, cold: bool) -> None:
    torch.manual_seed(0)
    weights = copies(ops.prepack_int4(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)), cold)
    scale, x_scale = torch.rand(n, 1) / k, torch.rand(m)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    y = torch.randn(m, k, dtype=BF16)

    baselines: dict[str, Callable[[], object]] = {}
    if cold:
        words = [w.view(torch.int64) for w in weights]
        baselines["read"] = turns([lambda w=w: w.sum() for w in words])
    else:
        dense = torch.randn(n, k, dtype=BF16)
        baselines["bf16"] = lambda: functional.linear(y, dense)
    if m <= MOST_TOKENS_INT4PACK:
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = copies(torch._convert_weight_to_int4pack_for_cpu(codes, 1), cold)
        grid = torch.randn(k // GROUP, n, 2, dtype=BF16)
        mm = torch._weight_int4pack_mm_for_cpu
        baselines["int4pack"] = turns([lambda w=w: mm(y, w, GROUP, grid) for w in packed])
    if m >= LEAST_TOKENS_INT8:
        int8 = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        baselines["int8"] = lambda: torch._int_mm(x, int8.t())
    case = measure(
        "linear_int4",
        f"{m} x {n} x {k} {'cold' if cold else 'warm'}",
        turns([lambda w=w: ops.linear_int4(x, x_scale, None, w, scale, out_dtype=BF16)
               for w in weights]),
        device="cpu",
        moved=n * k // 2 + m * k + 2 * m * n,
        baselines=baselines,
        sizes={"m": m, "n": n, "k": k},
        seconds=SECONDS,
    )  # fmt: skip
    report("cpu", case)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("name", ["hadamard", "quantize"])
def test_rows(report: Report, name: str, n: int) -> None:
    """512 rows of float32 against a copy into a tensor that is there."""
    x = torch.randn(512, n)
    target = torch.empty_like(x)
    op = getattr(ops, name)
    case = measure(
        name,
        f"512 x {n} float32",
        lambda: op(x),
        device="cpu",
        moved=2 * x.nbytes,
        baselines={"copy_": lambda: target.copy_(x)},
        sizes={"rows": 512, "n": n},
        seconds=SECONDS,
    )
    report("cpu", case)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "context", "queries"), ATTENTION)
def test_attention(
    report: Report, heads: int, kv_heads: int, dim: int, context: int, queries: int
) -> None:
    torch.manual_seed(0)
    rows = (1, kv_heads, context)

    def half() -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(0, 256, (*rows, dim // 2), dtype=torch.uint8)
        scale = ((torch.rand(rows) + 0.5) / 8).half()
        return codes, scale, torch.randint(0, 16, rows, dtype=torch.uint8)

    cache = (*half(), *half())
    q = torch.randn(1, queries, heads, dim, dtype=BF16)
    keys, values = (torch.randn(*rows, dim, dtype=BF16) for _ in range(2))
    lengths = torch.tensor([context], dtype=torch.int32)

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, is_causal=queries > 1, enable_gqa=True
        )

    case = measure(
        "attention",
        f"{heads}/{kv_heads} x {dim} ctx {context} S{queries}",
        lambda: ops.attention(q, *cache, lengths, bits=4, scale=dim**-0.5, length=context),
        device="cpu",
        moved=sum(t.nbytes for t in cache) + 2 * q.nbytes,
        baselines={"sdpa": sdpa},
        seconds=SECONDS,
    )
    report("cpu", case)


def test_model(report: Report) -> None:
    """Time a token through `generate`, greedy, of the prompt and after it: W4A8KV4 beside bf16."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_theta=100000.0, max_position_embeddings=8192, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    model.generation_config.eos_token_id = None  # all tokens asked for come
    peers = {"bf16": rates(model)}
    start = time.perf_counter()
    model = quarot.convert(model, "W4A8KV4", progress=False)
    seconds = time.perf_counter() - start
    ours = rates(model)
    path = os.environ.get("QUAROT_BENCH_GGUF")
    if path and importlib.util.find_spec("llama_cpp"):
        peers["llama.cpp"] = llama_cpp_rates(path)
    for i, (name, tokens) in enumerate({"prompt": PROMPT, "decode": NEW}.items()):
        baselines = {peer: ours[i] / rate[i] for peer, rate in peers.items()}
        shape = f"{name} {tokens}, {ours[i]:.0f} tokens/s"
        report("cpu", Case("generate", shape, 1e6 / ours[i], None, None, baselines))
    layers = f"{config.num_hidden_layers} layers"
    report("cpu", Case("convert", layers, seconds * 1e6, None, None, {}))


def least_seconds(run: Callable[[], object]) -> float:
    """Return the least time of some runs: they take seconds, and a median would take minutes."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def rates(model: Any) -> tuple[float, float]:
    """Return prompt and new tokens a second."""
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT))

    def generate(new: int) -> float:
        options = {"do_sample": False, "max_new_tokens": new}
        return least_seconds(
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        )

    first = generate(1)
    return PROMPT / first, (NEW - 1) / (generate(NEW) - first)


def llama_cpp_rates(path: str) -> tuple[float, float]:
    """The same of a GGUF file in llama.cpp, with as many threads."""
    import llama_cpp

    llama = llama_cpp.Llama(path, n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)
    ids = list(range(1000, 1000 + PROMPT))

    def generate(new: int) -> float:
        def run() -> None:
            llama.reset()
            for _ in itertools.islice(llama.generate(ids, temp=0.0), new):
                pass

        return least_seconds(run)

    first = generate(1)
    return PROMPT / first, (NEW - 1) / (generate(NEW) - first)
