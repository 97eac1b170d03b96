"""Time a whole model: prefill, a decode step, a token through `generate`; and count its memory.

`quarot bench model` measures in one run: the converted model, and transformers' own in bfloat16,
eagerly and compiled with a static cache. A step at a long context is timed on a cache filled with
random codes (for transformers: random keys and values), which takes no prefill.

Over 300 lines by a few: what is measured, and how, in one file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig

from quarot.cache import adopt
from quarot.generate import generate
from quarot.models import Geometry, describe
from quarot.modules.decoder_layer import DecoderLayer
from quarot.shapes import DTYPE, build

PARTS = ("prefill", "decode", "generate", "memory")
OURS, EAGER, COMPILED = "quarot", "hf eager", "hf compiled"

PROMPT = 2048
PREFILL_BATCHES = (1, 16)
BATCHES, CONTEXTS = (1, 4, 16, 64), (2048, 8192, 32768)
# Compiling takes transformers' model some 20 s for each shape of cache.
COMPILED_CASES = ((1, 2048), (16, 2048))
QUICK_CASES = ((1, 2048), (16, 2048), (1, 8192))
MEMORY_CONTEXT = 8192

ROOM = 256  # tokens that a timed cache has room for beyond its context
# New tokens: the difference of two texts is the time of their tokens. The longer one fills a cache
# as large as a timed step's, so that transformers compiles once for both.
FEW, MANY = 17, ROOM + 1
WARM, GROUPS, STEPS = 3, 5, 10
SECONDS = 1  # a slow case has fewer groups
SPARE = 6 << 30  # bytes of device memory left to what is not weights and cache

logger = logging.getLogger("quarot")

Report = Callable[[dict[str, Any]], None]
Measure = Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        shape: a key of SHAPES;  preset: of the converted model;  device: where.
        parts: of PARTS;  cases: (batch, context) of decode;  compiled: those to compile for.
        seconds: of measuring, models not counted, after which no further case of a form is begun;
            None = all are.
    """

    shape: str
    preset: str
    device: torch.device
    parts: tuple[str, ...] = PARTS
    cases: tuple[tuple[int, int], ...] = tuple((b, c) for c in CONTEXTS for b in BATCHES)
    compiled: tuple[tuple[int, int], ...] = COMPILED_CASES
    seconds: float | None = None


def bench_model(plan: Plan, report: Report) -> None:
    """Measure a plan; `report` gets each result, or {"skipped": why}, as soon as it is there.

    A result has form (OURS, EAGER, COMPILED), what, batch, context, and ms or bytes.
    """
    for preset in (plan.preset, None):
        _free(plan.device)
        model = build(plan.shape, preset, plan.device)
        start = time.perf_counter()
        for case, measure in _cases(model, EAGER if preset is None else OURS, plan):
            if plan.seconds is not None and time.perf_counter() - start > plan.seconds:
                report({**case, "skipped": f"{plan.seconds:.0f} s are over"})
            else:
                logger.info("measuring {form}, {what}, {batch} x {context}".format(**case))
                report({**case, **measure()})
        del model, measure


def _cases(model: Any, form: str, plan: Plan) -> Iterator[tuple[dict[str, Any], Measure]]:
    """Yield what to measure of a model and how, in the order of importance."""
    if "memory" in plan.parts:
        yield _case(form, "memory", 1, MEMORY_CONTEXT), functools.partial(_memory, model)
    if "prefill" in plan.parts:
        for batch in PREFILL_BATCHES:
            measure = functools.partial(_prefill, model, batch)
            yield _case(form, "prefill", batch, PROMPT), measure
    if "generate" in plan.parts:
        # transformers' own compiles for a static cache.
        name = OURS if form == OURS else COMPILED
        yield _case(name, "generate", 1, PROMPT), functools.partial(_generate, model)
        if form == OURS:
            measure = functools.partial(_generate, model, custom_generate=generate)
            yield _case(name, "generate, own loop", 1, PROMPT), measure
    if "decode" in plan.parts:
        compiled = [case for case in plan.compiled if case in plan.cases and form != OURS]
        steps = [(COMPILED, *case) for case in compiled] + [(form, *case) for case in plan.cases]
        for name, batch, context in steps:
            measure = functools.partial(_decode, model, name, batch, context)
            yield _case(name, "decode", batch, context), measure


def _case(form: str, what: str, batch: int, context: int) -> dict[str, Any]:
    return {"form": form, "what": what, "batch": batch, "context": context}


def line(case: dict[str, Any], before: Sequence[dict[str, Any]] = ()) -> str:
    """Return a result as a line of a table: a peer's with how many times ours, if measured."""
    where = f"{case['form']:11} | {case['what']:18} | {case['batch']:2} x {case['context']:5} | "
    if "skipped" in case:
        return f"{where}skipped: {case['skipped']}"
    if "ms" not in case:
        weights, cache = case["weight_bytes"] / 1e9, case["kv_bytes"] / 1e9
        return f"{where}weights {weights:.3f} GB, KV {cache:.3f} GB"
    text = f"{where}{case['ms']:9.3f} ms"
    for other in before:
        same = all(other[key] == case[key] for key in ("batch", "context")) and "ms" in other
        if (
            same
            and other["form"] == OURS != case["form"]
            and other["what"].startswith(case["what"])
        ):
            text += f" | {case['ms'] / other['ms']:5.2f} x {OURS}'s {other['what']}"
    return text


# --- what is measured -----------------------------------------------------------------------------


def _memory(model: Any) -> dict[str, Any]:
    """Bytes of weights, and of the cache of one sequence as a static cache allocates it."""
    cache = _filled(model, 1, MEMORY_CONTEXT - ROOM)
    stored = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return {
        "weight_bytes": _bytes([*model.parameters(), *model.buffers()]),
        "kv_bytes": _bytes(stored),
    }


@torch.no_grad()
def _prefill(model: Any, batch: int) -> dict[str, Any]:
    if batch > 1 and model.device.type == "cpu":
        return {"skipped": "it takes many minutes on a CPU"}
    ids = _random_ids(model, batch, PROMPT)

    def run() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    with _peak(model.device) as peak:
        ms = _milliseconds(run, model.device)
    return {"ms": ms, **peak}


@torch.no_grad()
def _decode(model: Any, form: str, batch: int, context: int) -> dict[str, Any]:
    device = model.device
    if reason := _too_large(model, device, batch, context):
        return {"skipped": reason}
    mask = torch.ones(batch, context + 1, dtype=torch.int64, device=device)
    with _peak(device) as peak:
        inputs = model.prepare_inputs_for_generation(
            _random_ids(model, batch, 1),
            past_key_values=_filled(model, batch, context, static=form != EAGER),
            attention_mask=None if form == OURS else mask,
            position_ids=torch.full((batch, 1), context, device=device),
            use_cache=True,
            logits_to_keep=1,
        )
        call: Any = model
        if form == COMPILED:
            torch._dynamo.reset()
            vars(model).pop("_compiled_call", None)
            call = model.get_compiled_call(CompileConfig())
        ms = _milliseconds(lambda: call(**inputs, return_dict=True), device, STEPS)
    return {"ms": ms, **peak}


def _generate(model: Any, **options: Any) -> dict[str, Any]:
    """Time a token through `generate` at batch 1."""
    ids = _random_ids(model, 1, PROMPT)
    model.generation_config.eos_token_id = None  # all texts are of one length

    def seconds(new: int) -> float:
        start = time.perf_counter()
        static = {"cache_implementation": "static", **options}
        out = model.generate(ids, max_new_tokens=new, do_sample=False, **static)
        assert out.shape[1] == ids.shape[1] + new
        _synchronize(model.device)
        return time.perf_counter() - start

    seconds(MANY)  # compiles where transformers does; the cache is of the longest text
    times = [(seconds(MANY) - seconds(FEW)) / (MANY - FEW) * 1e3 for _ in range(2)]
    return {"ms": min(times)}


# --- caches ----------------------------------------------------------------------------


def _filled(model: Any, batch: int, context: int, *, static: bool = True) -> Cache:
    """Return a cache that holds `context` random tokens, with room for ROOM more."""
    config, device = model.config, model.device
    cache = StaticCache(config, max_cache_len=context + ROOM) if static else DynamicCache()
    layers, geometry = _layers(model)
    for index, decoder in enumerate(layers):
        spec = getattr(decoder, "cache_spec", None)
        if spec is not None and spec.bits < 16:
            layer = adopt(cache, index, spec)
            layer.reserve(batch, context, device)
            for buffer in layer.buffers:
                if buffer.is_floating_point():
                    buffer.fill_(2.0**-spec.bits)
                else:
                    buffer.random_(0, 2**spec.bits if buffer.ndim == 3 else 256)
            layer.advance(context)
        else:
            shape = (batch, geometry.kv_heads, context, geometry.head_dim)
            keys = torch.randn(shape, dtype=DTYPE, device=device)
            cache.update(keys, keys, index)
    return cache


def _layers(model: Any) -> tuple[Any, Geometry]:
    """Return a model's decoder layers and its sizes."""
    arch = describe(model.config)
    layers = model.get_submodule(arch.layers)
    ours = isinstance(layers[0], DecoderLayer)
    return layers, layers[0].geometry if ours else arch.geometry(model.config)


def _too_large(model: Any, device: torch.device, batch: int, context: int) -> str | None:
    """Say why a case cannot be measured, if it cannot."""
    longest = model.config.max_position_embeddings
    if context + ROOM > longest:
        return f"the model has {longest} positions"
    if device.type != "cuda":
        return None
    layers, geometry = _layers(model)
    spec = getattr(layers[0], "cache_spec", None)
    bits = 16 if spec is None else spec.bits
    entry = geometry.head_dim * bits // 8 + (0 if bits == 16 else 3)  # scale and zero
    needed = 2 * geometry.layers * geometry.kv_heads * batch * (context + ROOM) * entry
    free = torch.cuda.mem_get_info(device)[0]
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed + SPARE > free + reusable:
        return f"the cache needs {needed / 1e9:.0f} GB, {(free + reusable) / 1e9:.0f} GB are free"
    return None


# --- timing ---------------------------------------------------------------------------------------


def _milliseconds(run: Callable[[], object], device: torch.device, group: int = 1) -> float:
    """Return the median time of `run()`, of groups called one after the other, then waited for.

    A group lets the host prepare a step while the device computes the one before, as a loop does.
    Slow runs come in smaller groups, and fewer.
    """

    def seconds(count: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _synchronize(device)
        return (time.perf_counter() - start) / count

    once = min(seconds(1) for _ in range(WARM))
    group = max(1, min(group, int(SECONDS / GROUPS / once)))
    times: list[float] = []
    while len(times) < GROUPS and (len(times) < 2 or sum(times) * group < SECONDS):
        times.append(seconds(group))
    return statistics.median(times) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a dictionary that gets peak_bytes, the most memory allocated meanwhile, on a GPU."""
    peak: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak["peak_bytes"] = torch.cuda.max_memory_allocated(device)


def _free(device: torch.device) -> None:
    """Give back what an earlier model held."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _random_ids(model: Any, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each piece of memory once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
