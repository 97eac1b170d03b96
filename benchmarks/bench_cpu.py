"""What a CPU has to beat, on two threads: torch's int4, bf16 and int8 products, SDPA, a plain copy,
transformers' bf16 model and, where it is installed, llama.cpp's Python package.

Each case runs beside its peers. "warm" weights stay in the cache, "cold" ones rotate through copies
of four times the last-level cache; "read" sums the same bytes. The model has SmolLM2-135M's shape
and random weights; llama.cpp needs a file: QUAROT_BENCH_GGUF.

    OMP_NUM_THREADS=2 taskset -c A,B python -m pytest -s benchmarks/bench_cpu.py

A and B must not share a core (`lscpu -e`; a guest may not be told): hyperthreads of one take turns.
"""

from __future__ import annotations

import copy
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
from bench_attention import Shape, attend, make, verify
from bench_linear_int4 import verify as verify_linear
from common import Case, check_error, measure
from quarot import hadamard, ops
from quarot.modules import replay
from quarot.ops import reference

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
ATTENTION = [
    Shape(1, 4096, heads=9, kv_heads=3, dim=64),
    Shape(1, 4096),
    Shape(1, 512, heads=9, kv_heads=3, dim=64, queries=512),
]
PROMPT, NEW = 512, 64
RUNS = 5

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
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    weights = copies(ops.prepack_int4(codes), cold)
    scale, x_scale = torch.rand(n, 1) / k, torch.rand(m)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    y = torch.randn(m, k, dtype=BF16)

    def run(w: Tensor) -> Tensor:
        return ops.linear_int4(x, x_scale, None, w, scale, out_dtype=BF16)

    verify_linear(run(weights[0]), x, x_scale, codes, scale)
    baselines: dict[str, Callable[[], object]] = {}
    if cold:
        words = [w.view(torch.int64) for w in weights]
        baselines["read"] = turns([lambda w=w: w.sum() for w in words])
    else:
        dense = torch.randn(n, k, dtype=BF16)
        baselines["bf16"] = lambda: functional.linear(y, dense)
    if m <= MOST_TOKENS_INT4PACK:
        nibbles = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = copies(torch._convert_weight_to_int4pack_for_cpu(nibbles, 1), cold)
        grid = torch.randn(k // GROUP, n, 2, dtype=BF16)
        mm = torch._weight_int4pack_mm_for_cpu
        baselines["int4pack"] = turns([lambda w=w: mm(y, w, GROUP, grid) for w in packed])
    if m >= LEAST_TOKENS_INT8:
        int8 = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        baselines["int8"] = lambda: torch._int_mm(x, int8.t())
    case = measure(
        "linear_int4",
        f"{m} x {n} x {k} {'cold' if cold else 'warm'}",
        turns([lambda w=w: run(w) for w in weights]),
        device="cpu",
        moved=n * k // 2 + m * k + 2 * m * n,
        baselines=baselines,
        sizes={"m": m, "n": n, "k": k},
        seconds=SECONDS,
    )
    report("cpu", case)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("name", ["hadamard", "quantize"])
def test_rows(report: Report, name: str, n: int) -> None:
    """512 rows of float32 against a copy into a tensor that is there."""
    x = torch.randn(512, n)
    target = torch.empty_like(x)
    op = getattr(ops, name)
    head, result = x[:16], op(x)
    if name == "hadamard":
        exact = hadamard.transform(head.double())
        check_error(result[:16], exact, hadamard.transform(head), what=f"hadamard {n}")
    elif not all(
        torch.equal(a[:16], b)
        for a, b in zip(result[:2], reference.quantize(head)[:2], strict=True)
    ):
        raise AssertionError(f"quantize {n}: differs from the reference")
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


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention(report: Report, shape: Shape) -> None:
    torch.manual_seed(0)
    q, cache = make(shape, "cpu")
    lengths = shape.lengths("cpu")
    verify(shape, q, cache, lengths)
    rows = (1, shape.kv_heads, shape.context, shape.dim)
    keys, values = (torch.randn(rows, dtype=BF16) for _ in range(2))

    def sdpa() -> Tensor:
        return functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, is_causal=shape.queries > 1, enable_gqa=True
        )

    case = measure(
        "attention",
        str(shape),
        lambda: attend(shape, q, cache, lengths),
        device="cpu",
        moved=sum(t.nbytes for t in cache) + 2 * q.nbytes,
        baselines={"sdpa": sdpa},
        seconds=SECONDS,
    )
    report("cpu", case)


def test_model(report: Report) -> None:
    """Time a token through `generate`, greedy, of the prompt and after it: W4A8KV4 beside bf16.

    Verified: the replayed steps give the tokens of steps that are not.
    """
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_theta=100000.0, max_position_embeddings=8192, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).bfloat16().eval()
    theirs.generation_config.eos_token_id = None  # all tokens asked for come
    start = time.perf_counter()
    model = quarot.convert(copy.deepcopy(theirs), "W4A8KV4", progress=False)
    seconds = time.perf_counter() - start
    ids = torch.randint(3, config.vocab_size, (1, PROMPT))
    replayed = greedy(model, ids, NEW)
    if sum(tape.usable for tape in replay._tapes.values()) != config.num_hidden_layers:
        raise AssertionError("not every layer's steps were replayed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "enabled", False)
        if not torch.equal(replayed, greedy(model, ids, NEW)):
            raise AssertionError("replayed steps give other tokens")
    generators: dict[str, Callable[[int], object]] = {
        "ours": lambda new: greedy(model, ids, new),
        "bf16": lambda new: greedy(theirs, ids, new),
    }
    path = os.environ.get("QUAROT_BENCH_GGUF")
    if path and importlib.util.find_spec("llama_cpp"):
        generators["llama.cpp"] = llama_cpp(path)
    peers = rates(generators)
    ours = peers.pop("ours")
    for i, (name, tokens) in enumerate({"prompt": PROMPT, "decode": NEW}.items()):
        baselines = {peer: ours[i] / rate[i] for peer, rate in peers.items()}
        shape = f"{name} {tokens}, {ours[i]:.0f} tokens/s"
        report("cpu", Case("generate", shape, 1e6 / ours[i], None, None, baselines))
    layers = f"{config.num_hidden_layers} layers"
    report("cpu", Case("convert", layers, seconds * 1e6, None, None, {}))


@torch.inference_mode()
def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": new}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def rates(generators: dict[str, Callable[[int], object]]) -> dict[str, tuple[float, float]]:
    """Return each one's prompt and new tokens a second: of the least times of runs by turns.

    A run takes seconds; a median would take minutes, and a neighbour on the core may stay as long.
    """
    least: dict[tuple[str, int], float] = {}
    for _ in range(RUNS):
        for name, generate in generators.items():
            for new in (1, NEW):
                start = time.perf_counter()
                generate(new)
                seconds = time.perf_counter() - start
                least[name, new] = min(seconds, least.get((name, new), seconds))
    return {
        name: (PROMPT / least[name, 1], (NEW - 1) / (least[name, NEW] - least[name, 1]))
        for name in generators
    }


def llama_cpp(path: str) -> Callable[[int], None]:
    """Return what makes so many new tokens of a GGUF file in llama.cpp, with as many threads."""
    from llama_cpp import Llama

    llama = Llama(path, n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)
    ids = list(range(1000, 1000 + PROMPT))

    def generate(new: int) -> None:
        llama.reset()
        for _ in itertools.islice(llama.generate(ids, temp=0.0), new):
            pass

    return generate
