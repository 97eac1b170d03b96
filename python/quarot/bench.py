"""Time a whole model: prefill, a decode step, a token through `generate`; and its memory.

`quarot bench model` measures in one run: the converted model, and transformers' own in bfloat16,
eagerly and compiled with a static cache. Weights are random but for smollm2: time does not depend
on what a model says. A step at a long context is timed on a cache filled with random codes (for
transformers: random keys and values), which takes no prefill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig

from quarot import hf
from quarot.cache import adopt
from quarot.config import QuarotConfig
from quarot.convert import convert
from quarot.generate import generate
from quarot.models import Geometry, describe
from quarot.modules.canonical import linear_shapes, norm_shapes
from quarot.modules.decoder_layer import DecoderLayer

SMOLLM2 = "smollm2"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    SMOLLM2: {},  # real weights
}

PARTS = ("prefill", "decode", "generate", "memory")
OURS, EAGER, COMPILED = "quarot", "hf eager", "hf compiled"

DTYPE = torch.bfloat16
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

Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        shape: a key of SHAPES;  preset: of the converted model;  device: where.
        parts: of PARTS;  cases: (batch, context) of decode;  compiled: those to compile for.
    """

    shape: str
    preset: str
    device: torch.device
    parts: tuple[str, ...] = PARTS
    cases: tuple[tuple[int, int], ...] = tuple((b, c) for c in CONTEXTS for b in BATCHES)
    compiled: tuple[tuple[int, int], ...] = COMPILED_CASES
    prefill_batches: tuple[int, ...] = PREFILL_BATCHES


def bench_model(plan: Plan, report: Report) -> None:
    """Measure a plan; `report` gets each result, or {"skipped": why}, as soon as it is there.

    A result has form (OURS, EAGER, COMPILED), what, and batch, context, ms or bytes.
    """
    for preset in (plan.preset, None):
        _free(plan.device)
        model = build(plan.shape, preset, plan.device)
        form = EAGER if preset is None else OURS
        if "memory" in plan.parts:
            report(_memory(model, form))
        if "prefill" in plan.parts:
            _prefill(model, form, plan, report)
        if "decode" in plan.parts:
            for batch, context in plan.cases:
                _decode(model, form, plan, batch, context, report)
        if "generate" in plan.parts:
            _generate(model, form, plan, report)
        if preset is None and "decode" in plan.parts:
            for batch, context in plan.compiled:
                if (batch, context) in plan.cases:
                    _decode(model, COMPILED, plan, batch, context, report)
        del model


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
    ours = [
        other
        for other in before
        if other["form"] == OURS != case["form"]
        and (other["batch"], other["context"]) == (case["batch"], case["context"])
        and other["what"].startswith(case["what"])
        and "ms" in other
    ]
    ratios = (f" | {case['ms'] / other['ms']:5.2f} x {OURS}'s {other['what']}" for other in ours)
    return f"{where}{case['ms']:9.3f} ms{''.join(ratios)}"


# --- what is measured -----------------------------------------------------------------------------


def _memory(model: Any, form: str) -> dict[str, Any]:
    """Bytes of weights, and of the cache of one sequence as a static cache allocates it."""
    cache = _filled(model, 1, MEMORY_CONTEXT - ROOM)
    stored = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return {
        **_case(form, "memory", 1, MEMORY_CONTEXT),
        "weight_bytes": _bytes([*model.parameters(), *model.buffers()]),
        "kv_bytes": _bytes(stored),
    }


@torch.no_grad()
def _prefill(model: Any, form: str, plan: Plan, report: Report) -> None:
    for batch in plan.prefill_batches:
        ids = _random_ids(model, batch, PROMPT)

        def run(ids: Tensor = ids) -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        with _peak(plan.device) as peak:
            ms = _milliseconds(run, plan.device)
        report({**_case(form, "prefill", batch, PROMPT), "ms": ms, "peak_bytes": peak[0]})


@torch.no_grad()
def _decode(model: Any, form: str, plan: Plan, batch: int, context: int, report: Report) -> None:
    case = _case(form, "decode", batch, context)
    if reason := _too_large(model, plan.device, batch, context):
        report({**case, "skipped": reason})
        return
    with _peak(plan.device) as peak:
        cache = _filled(model, batch, context, static=form != EAGER)
        inputs = model.prepare_inputs_for_generation(
            _random_ids(model, batch, 1),
            past_key_values=cache,
            attention_mask=None
            if form == OURS
            else torch.ones(batch, context + 1, dtype=torch.int64, device=plan.device),
            position_ids=torch.full((batch, 1), context, device=plan.device),
            use_cache=True,
            logits_to_keep=1,
        )
        call: Any = model
        if form == COMPILED:
            torch._dynamo.reset()
            vars(model).pop("_compiled_call", None)
            call = model.get_compiled_call(CompileConfig())
            for _ in range(2):  # compile, then capture
                call(**inputs, return_dict=True)
        ms = _milliseconds(lambda: call(**inputs, return_dict=True), plan.device, STEPS)
    report({**case, "ms": ms, "peak_bytes": peak[0]})


def _generate(model: Any, form: str, plan: Plan, report: Report) -> None:
    """Time a token through `generate` at batch 1: transformers' loop, and ours."""
    ids = _random_ids(model, 1, PROMPT)
    loops: dict[str, dict[str, Any]] = {"generate": {}}
    if form == OURS:
        loops["generate, own loop"] = {"custom_generate": generate}
    for what, options in loops.items():

        def seconds(new: int, options: dict[str, Any] = options) -> float:
            start = time.perf_counter()
            out = model.generate(
                ids,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                cache_implementation="static",
                **options,
            )
            assert out.shape[1] == ids.shape[1] + new
            _synchronize(plan.device)
            return time.perf_counter() - start

        seconds(MANY)  # compiles where transformers does; the cache is of the longest text
        times = [(seconds(MANY) - seconds(FEW)) / (MANY - FEW) * 1e3 for _ in range(2)]
        name = COMPILED if form == EAGER else form  # generate compiles for a static cache
        report({**_case(name, what, 1, PROMPT), "ms": min(times)})


# --- models and caches ----------------------------------------------------------------------------


@torch.no_grad()
def build(shape: str, preset: str | None, device: torch.device) -> Any:
    """Build a causal LM of a shape: converted to `preset`, or transformers' own for None.

    Random int4 weights are drawn as codes, so that a layer needs no more memory than it keeps.
    """
    if shape == SMOLLM2:
        model = hf.load_model(SMOLLM2, dtype=DTYPE, device=device)[0]
        return model if preset is None else convert(model, preset, progress=False)
    with torch.device("meta"):
        # Llama 3.1's length, whatever the shape: for positions in rotary's frequencies only.
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=False
        )
        model = LlamaForCausalLM(config).to(DTYPE).eval().requires_grad_(False)
    arch = describe(config)
    layers, rotary = model.get_submodule(arch.layers), model.get_submodule(arch.rotary)
    for name, frequencies in type(rotary)(config).named_buffers():
        setattr(rotary, name, frequencies.to(device))
    for path in (arch.embedding, arch.final_norm, arch.head):
        _materialise(model.get_submodule(path), device)
    if preset is None:
        _materialise(layers, device)
        return model
    own = QuarotConfig.from_preset(preset)
    for index, old in enumerate(layers):
        layers[index] = _random_layer(old, model.config, own, index, device)
    return hf.adopt(model, own)


def _materialise(module: torch.nn.Module, device: torch.device) -> None:
    """Give a module on the meta device memory, and values that keep activations near one."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _random_layer(
    old: Any, config: Any, own: QuarotConfig, index: int, device: torch.device
) -> Any:
    arch = describe(config)
    geometry = arch.geometry(config)
    layer = hf.new_layer(old, arch, geometry, own, index, DTYPE, "meta", "kernel")
    state: dict[str, Tensor] = {}
    for path, (rows, columns) in linear_shapes(arch, geometry).items():
        size = columns**-0.5
        if own.w_bits == 16:
            state[f"{path}.weight"] = size * torch.randn(rows, columns, dtype=DTYPE, device=device)
            continue
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        groups = columns // own.w_group if own.w_group else 1
        deviation = 4.6  # of uniform int4 codes
        state[f"{path}.weight_packed"] = packed
        state[f"{path}.weight_scale"] = torch.full((rows, groups), size / deviation, device=device)
    for path, entries in norm_shapes(arch, geometry).items():
        state[f"{path}.weight"] = torch.ones(entries, dtype=DTYPE, device=device)
    layer.load_state_dict(state, assign=True)
    layer.fuse()
    return layer


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
    """
    for _ in range(WARM):
        run()
    times: list[float] = []
    while len(times) < GROUPS and (len(times) < 2 or sum(times) * group < SECONDS):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(group):
            run()
        _synchronize(device)
        times.append((time.perf_counter() - start) / group)
    return statistics.median(times) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int | None]]:
    """Yield a list that gets the most memory allocated meanwhile, in bytes; None on a CPU."""
    peak: list[int | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)


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
