"""Decode by CUDA graphs gives bit by bit what eager decode gives, whatever happens in between.

Same kernels, same shapes, so equality holds at 4 bits too. `model.quarot_graph = False` is the
eager model.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

import quarot
from helpers import NO_CUDA, tiny_model
from quarot import graph, shapes
from quarot.cache import Lengths, QuantizedLayer

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROMPT, NEW = 60, 12


def on_gpu(preset: str = "W4A4KV4", **overrides: Any) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, **overrides}
    model = tiny_model(dtype=torch.bfloat16, **sizes).to(CUDA)
    return quarot.convert(model, preset, progress=False)


@pytest.fixture(scope="module")
def shared() -> Any:
    return on_gpu()


@pytest.fixture
def model(shared: Any) -> Iterator[Any]:
    """A converted model on the GPU without graphs yet."""
    graph._recorders.pop(shared, None)
    yield shared
    shared.quarot_graph = True


def graphs(model: Any) -> int:
    return len(graph._recorders[model].graphs) if model in graph._recorders else 0


def prompt(batch: int = 1, tokens: int = PROMPT, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, tokens), generator=generator).to(CUDA)


@torch.no_grad()
def decode(
    model: Any, cache: Any, ids: Tensor, new: int = NEW, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Append ids, then `new` tokens greedily; return all steps' last logits [batch, steps, V]."""
    logits = []
    for _ in range(new + 1):
        out = model(ids, past_key_values=cache, attention_mask=mask, **options)
        logits.append(out.logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(logits, 1)


def eagerly(model: Any, *args: Any, **options: Any) -> Tensor:
    model.quarot_graph = False
    try:
        return decode(model, *args, **options)
    finally:
        model.quarot_graph = True


# --- the model's class, on any device -----------------------------------------------------------


def test_the_class_stays_what_it_was_for_others() -> None:
    model = quarot.convert(tiny_model(), "W4A8KV4", progress=False)
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    assert inspect.signature(model.forward) == inspect.signature(tiny_model().forward)
    assert type(model) is type(quarot.convert(tiny_model(seed=1), "W4A4KV4", progress=False))
    assert "quarot_graph" not in vars(model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_are_models_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = quarot.convert(tiny_model(), "W4A4KV4", progress=False)
    twin = copied(copied(model))
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    assert type(twin) is type(model)
    assert type(twin.model.rotary_emb) is type(model.model.rotary_emb)
    assert torch.equal(twin(ids).logits, expected)
    twin.quarot_graph = False
    twin.lm_head.weight.data.zero_()
    assert model.quarot_graph and torch.equal(model(ids).logits, expected)
    assert not twin(ids).logits.any()


# --- the same as eager decode -------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("preset", ["W4A4KV4", "W4A8KV8", "W16A16KV4", "W4A16KV8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_replay_equals_eager(preset: str, head_dim: int) -> None:
    model = on_gpu(preset, head_dim=head_dim)
    for batch, padding, static in ((1, 0, True), (1, 0, False), (3, 0, False), (3, 7, True)):
        ids, mask = prompt(batch), None
        if padding:
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0
        caches = [
            StaticCache(model.config, max_cache_len=100) if static else DynamicCache()
            for _ in range(2)
        ]
        before = graphs(model)
        got = decode(model, caches[0], ids, mask=mask)
        assert graphs(model) > before
        assert torch.equal(got, eagerly(model, caches[1], ids, mask=mask))
        assert caches[0].get_seq_length() == PROMPT + NEW


@needs_cuda
@torch.no_grad()
def test_masks_of_ones_and_positions_need_no_other_graph(model: Any) -> None:
    ids, cache = prompt(2), StaticCache(model.config, max_cache_len=100)
    expected = decode(model, cache, ids)
    cache.reset()
    assert torch.equal(decode(model, cache, ids, mask=torch.ones_like(ids)), expected)
    cache.reset()
    positions = torch.arange(PROMPT, device=CUDA)[None]
    for step in range(NEW + 1):
        logits = model(ids, past_key_values=cache, position_ids=positions).logits[:, -1]
        assert torch.equal(logits, expected[:, step])
        ids, positions = logits.argmax(-1, keepdim=True), positions[:, -1:] + 1
    assert graphs(model) == 1
    # It is the positions given that count.
    results = []
    for model.quarot_graph in (True, False):
        for given in (positions, positions + 5, torch.cat((positions, positions + 7))):
            results.append(model(ids, past_key_values=cache, position_ids=given).logits)
            cache.crop(-1)
    assert all(torch.equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@needs_cuda
@torch.no_grad()
def test_a_short_mask_of_ones_hides_what_is_beyond_it(model: Any) -> None:
    cache = StaticCache(model.config, max_cache_len=100)
    ids = decode(model, cache, prompt(2))[:, -1].argmax(-1, keepdim=True)
    logits = {}
    for keys in (20, PROMPT + NEW + 1, 90):
        mask = torch.ones(2, keys, dtype=torch.int64, device=CUDA)
        for replayed in (True, False):
            model.quarot_graph = replayed
            for _ in range(3 if replayed else 1):  # eager, captured, replayed
                logits[keys, replayed] = model(
                    ids, past_key_values=cache, attention_mask=mask
                ).logits
                cache.crop(-1)
        assert torch.equal(logits[keys, True], logits[keys, False])
    assert not torch.equal(logits[20, True], logits[90, True])


@needs_cuda
def test_a_growing_cache_is_captured_again(model: Any) -> None:
    ids = prompt(2)
    got = decode(model, DynamicCache(), ids, new=600)
    assert 1 < graphs(model) <= 4
    assert torch.equal(got, eagerly(model, DynamicCache(), ids, new=600))


@needs_cuda
def test_a_long_static_cache_is_exact_at_every_length(model: Any) -> None:
    """The graph is captured at one length and replayed up to the capacity."""

    def cache() -> StaticCache:
        return StaticCache(model.config, max_cache_len=700)

    got = decode(model, cache(), prompt(1, 3), new=696)
    assert torch.equal(got, eagerly(model, cache(), prompt(1, 3), new=696))


@needs_cuda
def test_graphs_are_bounded_and_old_ones_return(model: Any) -> None:
    caches = [StaticCache(model.config, max_cache_len=80) for _ in range(graph.MOST_GRAPHS + 3)]
    expected = eagerly(model, DynamicCache(), prompt())
    for _ in range(2):
        for cache in caches:
            assert torch.equal(decode(model, cache, prompt()), expected)
            cache.reset()
    assert graphs(model) == graph.MOST_GRAPHS


@needs_cuda
def test_caches_and_models_take_turns() -> None:
    models = [on_gpu(), on_gpu("W4A8KV8", num_hidden_layers=3)]
    expected, turns = [], []
    for seed, model in enumerate([*models, *models]):
        ids = prompt(1 + seed, seed=seed)
        expected.append(eagerly(model, DynamicCache(), ids))
        turns.append([model, DynamicCache(), ids, []])
    for _ in range(NEW + 1):
        for turn in turns:
            model, cache, ids, logits = turn
            logits.append(decode(model, cache, ids, new=0))
            turn[2] = logits[-1][:, -1].argmax(-1, keepdim=True)
    for (*_, logits), one in zip(turns, expected, strict=True):
        assert torch.equal(torch.cat(logits, 1), one)


@needs_cuda
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
    ],
)
def test_generate(model: Any, options: dict[str, Any]) -> None:
    def text() -> Tensor:
        torch.manual_seed(0)
        return model.generate(prompt(), max_new_tokens=40, min_new_tokens=40, **options)

    got = text()
    assert graphs(model) or "prompt_lookup_num_tokens" in options
    assert torch.equal(text(), got)
    model.quarot_graph = False
    assert torch.equal(text(), got)


@needs_cuda
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}])
def test_own_loop_generates_the_same_text(
    model: Any, options: dict[str, Any], stops: bool, padding: int
) -> None:
    """It starts a step before it knows whether there is one, and takes it back."""
    ids = prompt(3)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0

    def text(**more: Any) -> torch.Tensor:
        torch.manual_seed(0)
        cache = DynamicCache()
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **options, **more
        )
        assert cache.get_seq_length() == out.shape[1] - 1
        return out

    if stops:  # at what each row has at place 9, so that the text ends there or before
        options = {**options, "eos_token_id": text()[:, PROMPT + 9].unique().tolist()}
    expected = text()
    assert expected.shape[1] < PROMPT + 40 or not stops
    assert torch.equal(text(custom_generate=quarot.generate), expected)


@needs_cuda
def test_cropping_goes_back(model: Any) -> None:
    cache = DynamicCache()
    first = decode(model, cache, prompt(), new=20)
    cache.crop(-12)
    ids = first[:, -13].argmax(-1, keepdim=True)
    assert torch.equal(decode(model, cache, ids, new=11), first[:, -12:])


@needs_cuda
def test_a_copy_of_a_cache_goes_its_own_way(model: Any) -> None:
    cache = DynamicCache()
    first = decode(model, cache, prompt())
    twin, ids = copy.deepcopy(cache), first[:, -1].argmax(-1, keepdim=True)
    expected = decode(model, cache, ids)
    decode(model, cache, prompt(seed=3))
    assert torch.equal(decode(model, twin, ids), expected)


@needs_cuda
def test_on_another_stream(model: Any) -> None:
    expected = decode(model, StaticCache(model.config, max_cache_len=80), prompt())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = decode(model, StaticCache(model.config, max_cache_len=80), prompt())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


# --- what is not a plain step -------------------------------------------------------------------


@needs_two
def test_on_the_second_device(model: Any) -> None:
    expected = decode(model, DynamicCache(), prompt(2))
    other = copy.deepcopy(model).to("cuda:1")
    assert torch.cuda.current_device() == 0
    got = decode(other, DynamicCache(), prompt(2).to("cuda:1"))
    assert graphs(other) > 0
    assert torch.equal(got.to(CUDA), expected)


@needs_two
def test_a_model_split_over_devices_runs_eagerly(model: Any, tmp_path: Path) -> None:
    expected = decode(model, DynamicCache(), prompt(2))
    model.save_pretrained(tmp_path)
    first, second = ("model.embed_tokens", "model.layers.0"), ("model.layers.1", "model.norm")
    places = dict.fromkeys(first, 0) | dict.fromkeys((*second, "lm_head"), 1)
    split = quarot.load(tmp_path, device_map={**places, "model.rotary_emb": 0})
    assert torch.equal(decode(split, DynamicCache(), prompt(2)).to(CUDA), expected)
    assert graphs(split) == 0


@needs_cuda
@torch.no_grad()
def test_other_requests_run_eagerly(model: Any) -> None:
    cache = DynamicCache()
    ids = decode(model, cache, prompt())[:, -1].argmax(-1, keepdim=True)

    def step(**options: Any) -> Any:
        out = model(past_key_values=copy.deepcopy(cache), **{"input_ids": ids, **options})
        return out

    expected, captured = step().logits, graphs(model)
    assert len(step(output_hidden_states=True).hidden_states) == 3
    assert step(labels=ids).loss is not None
    assert torch.equal(step(return_dict=False)[0], expected)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(step(input_ids=None, inputs_embeds=embedded).logits, expected)
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(step().logits, expected) and seen == [1]
    hook.remove()
    with torch.autocast("cuda", torch.float16):
        step()
    with pytest.raises(ValueError, match="output_attentions"):
        step(output_attentions=True)
    assert graphs(model) == captured
    assert torch.equal(step().logits, expected) and seen == [1]


@needs_cuda
def test_settings_of_the_model_count_too(model: Any) -> None:
    decode(model, DynamicCache(), prompt())
    with torch.no_grad():
        cache = DynamicCache()
        model(prompt(), past_key_values=cache)
        model.config.output_hidden_states = True
        try:
            assert len(model(prompt(1, 1), past_key_values=cache).hidden_states) == 3
        finally:
            model.config.output_hidden_states = False
    captured = graphs(model)  # transformers' hooks for hidden states are still there
    decode(model, DynamicCache(), prompt(2))
    assert graphs(model) > captured


@needs_cuda
def test_a_model_is_freed_with_its_graphs() -> None:
    held = []
    for _ in range(2):  # the first also allocates what stays, such as cuBLAS's workspace
        model = on_gpu()
        decode(model, StaticCache(model.config, max_cache_len=80), prompt())
        assert graphs(model) == 1
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None
        held.append((torch.cuda.memory_allocated(), len(graph._recorders)))
    assert held[0] == held[1]


@needs_cuda
def test_a_kv16_cache_runs_eagerly() -> None:
    model = on_gpu("W4A4KV16")
    decode(model, DynamicCache(), prompt())
    assert graphs(model) == 0


@needs_cuda
def test_a_head_size_without_a_kernel_runs_eagerly() -> None:
    model = on_gpu(head_dim=16)
    decode(model, DynamicCache(), prompt())
    assert graphs(model) == 0


@needs_cuda
def test_a_full_static_cache_is_an_error(model: Any) -> None:
    cache = StaticCache(model.config, max_cache_len=PROMPT + NEW)
    ids = decode(model, cache, prompt())[:, -1].argmax(-1, keepdim=True)
    with pytest.raises(ValueError, match="max_cache_len"):
        decode(model, cache, ids, new=0)
    assert cache.get_seq_length() == PROMPT + NEW


@needs_cuda
def test_weights_that_moved(model: Any) -> None:
    model = copy.deepcopy(model)
    expected = decode(model, DynamicCache(), prompt())
    ballast = torch.empty(1 << 20, device=CUDA)  # so that they do not return to their places
    model.cpu()
    ballast = [ballast, *(torch.empty_like(p, device=CUDA) for p in model.parameters())]
    model.to(CUDA)
    assert torch.equal(decode(model, DynamicCache(), prompt()), expected)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight, requires_grad=False)
    changed = decode(model, DynamicCache(), prompt())
    assert torch.equal(changed[:, 0], -expected[:, 0])
    assert torch.equal(changed, eagerly(model, DynamicCache(), prompt()))


def _other_norm(model: Any) -> Any:
    norm = copy.deepcopy(model.model.norm)
    norm.weight.data *= torch.linspace(-1, 1, len(norm.weight), device=norm.weight.device)
    return norm


def _other_linear(model: Any) -> nn.Linear:
    weight = model.lm_head.weight
    linear = nn.Linear(*weight.T.shape, bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight = nn.Parameter(-weight, requires_grad=False)
    return linear


def _other_embedding(model: Any) -> nn.Embedding:
    weight = model.model.embed_tokens.weight
    return nn.Embedding.from_pretrained(weight.flip(0).contiguous())


def _patch(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: -forward(*args, **kwargs)


def _other_config(model: Any) -> None:
    model.config = copy.deepcopy(model.config)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "head": lambda m: setattr(m, "lm_head", _other_linear(m)),
    "set_output_embeddings": lambda m: m.set_output_embeddings(_other_linear(m)),
    "set_input_embeddings": lambda m: m.set_input_embeddings(_other_embedding(m)),
    "norm": lambda m: setattr(m.model, "norm", _other_norm(m)),
    "rotary": lambda m: setattr(m.model, "rotary_emb", copy.deepcopy(m.model.rotary_emb)),
    "decoder": lambda m: setattr(m, "model", copy.deepcopy(m.model)),
    "layers": lambda m: setattr(m.model, "layers", nn.ModuleList(reversed(m.model.layers))),
    "a layer": lambda m: m.model.layers.__setitem__(0, copy.deepcopy(m.model.layers[0])),
    "a layer's norm": lambda m: setattr(
        m.model.layers[0].input_layernorm,
        "weight",
        nn.Parameter(-m.model.layers[0].input_layernorm.weight, requires_grad=False),
    ),
    "a norm's dtype": lambda m: m.model.layers[1].post_attention_layernorm.float(),
    "a layer's scales": lambda m: setattr(
        m.model.layers[0].kernels["o"], "weight_scale", -m.model.layers[0].kernels["o"].weight_scale
    ),
    "a layer's forward": lambda m: _patch(m.model.layers[1]),
    "a linear's forward": lambda m: _patch(m.model.layers[0].kernels["down"]),
    "the norm's forward": lambda m: _patch(m.model.norm),
    "config": _other_config,
}
"""What a graph must notice; most of it changes logits."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    model = quarot.convert(tiny_model(), "W4A4KV4", progress=False)
    recorder = graph._Recorder(model)
    model(torch.tensor([[5, 6, 7]]), past_key_values=DynamicCache())
    assert not recorder.outdated(model)
    CHANGES[change](model)
    assert recorder.outdated(model)
    assert not graph._Recorder(model).outdated(model)


@needs_cuda
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_comes_into_effect(model: Any, change: str) -> None:
    model = copy.deepcopy(model)
    cache = StaticCache(model.config, max_cache_len=100)
    before = decode(model, cache, prompt())
    assert graphs(model)
    CHANGES[change](model)
    cache.reset()
    after = decode(model, cache, prompt())
    cache.reset()
    assert torch.equal(after, eagerly(model, cache, prompt()))
    same = change in ("rotary", "decoder", "a layer", "a norm's dtype", "config")
    assert torch.equal(before, after) == same


# --- failures -----------------------------------------------------------------------------------


@needs_cuda
def test_a_capture_that_fails_is_noted_and_decode_goes_on(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = eagerly(model, DynamicCache(), prompt())

    def look(self: QuantizedLayer) -> int:
        if self.lengths.recording:
            self.lengths.start.tolist()  # waits for the device: not while a graph is captured
        return self.length

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "quarot"):
        patch.setattr(QuantizedLayer, "known_length", property(look))
        assert torch.equal(decode(model, DynamicCache(), prompt()), expected)
        assert torch.equal(decode(model, DynamicCache(), prompt()), expected)
    assert caplog.text.count("capturing a decode step failed") == 1 and graphs(model) == 0
    eagerly(model, DynamicCache(), prompt())  # off and on again: it may try anew
    assert torch.equal(decode(model, DynamicCache(), prompt()), expected)
    assert graphs(model) > 0


@needs_cuda
def test_an_interrupted_capture_leaves_cache_and_model_usable(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = eagerly(model, DynamicCache(), prompt())
    cache = DynamicCache()
    logits = decode(model, cache, prompt(), new=1)  # the first step of a kind is eager

    def interrupt(self: Lengths, *args: Any) -> Any:
        raise KeyboardInterrupt

    ids = logits[:, -1].argmax(-1, keepdim=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at = Lengths.at
        patch.setattr(
            Lengths, "at", lambda self, *args: (interrupt if self.recording else at)(self, *args)
        )
        decode(model, cache, ids, new=0)
    assert cache.get_seq_length() == PROMPT + 1
    assert torch.equal(decode(model, cache, ids, new=NEW - 2), expected[:, 2:])


@needs_cuda
def test_out_of_memory_leaves_the_model_usable(model: Any) -> None:
    expected = decode(model, DynamicCache(), prompt())
    with pytest.raises(torch.OutOfMemoryError):
        decode(model, StaticCache(model.config, max_cache_len=1 << 34), prompt())
    assert torch.equal(decode(model, DynamicCache(), prompt()), expected)
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(used)  # not a byte more
    try:
        with pytest.raises(torch.OutOfMemoryError):
            decode(model, DynamicCache(), prompt(64, 4096))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(decode(model, DynamicCache(), prompt()), expected)


@needs_cuda
@pytest.mark.parametrize("loop", [{}, {"custom_generate": quarot.generate}])
def test_a_streamer_that_raises_leaves_the_model_usable(model: Any, loop: dict[str, Any]) -> None:
    """Our own loop has started the next step by then, and takes it back."""

    class Cancel(BaseStreamer):
        given = 0

        def put(self, tokens: Tensor) -> None:
            self.given += 1
            if self.given == 5:
                raise InterruptedError

        def end(self) -> None: ...

    def text(ids: Tensor, new: int, **options: Any) -> Tensor:
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)

    expected, cache = text(prompt(), NEW, **loop), DynamicCache()
    with pytest.raises(InterruptedError):
        text(prompt(), NEW, past_key_values=cache, streamer=Cancel(), **loop)
    assert cache.get_seq_length() == PROMPT + 3 and graphs(model) > 0
    seen = expected[:, : PROMPT + 4]
    assert torch.equal(text(seen, NEW - 4, past_key_values=cache, **loop), expected)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@needs_cuda
@torch.no_grad()
def test_nothing_grows_over_ten_thousand_tokens(model: Any) -> None:
    cache = StaticCache(model.config, max_cache_len=10_100)
    ids = decode(model, cache, prompt(), new=1000)[:, -1].argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    resident = resident_bytes()
    for _ in range(9000):
        ids = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
    assert resident_bytes() - resident < 4 << 20  # a kilobyte a token would be 9 MB
    assert graphs(model) == 1


# --- the shape of a step ------------------------------------------------------------------------


def kernels(model: Any, cache: Any, ids: Tensor) -> int:
    """Count the kernels of a decode step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        model(ids, past_key_values=cache)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device for event in profiler.events())


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("replayed", [False, True])
def test_a_layer_is_at_most_eleven_kernels(monkeypatch: pytest.MonkeyPatch, replayed: bool) -> None:
    """Of Llama-3-8B's sizes: the difference that a layer more makes."""
    counts = []
    for layers in (1, 3):
        small = {**shapes.SHAPES["llama-3-8b"], "num_hidden_layers": layers, "vocab_size": 1000}
        monkeypatch.setitem(shapes.SHAPES, "small", small)
        model = shapes.build("small", "W4A4KV4", CUDA)
        cache, ids = StaticCache(model.config, max_cache_len=300), prompt(1, 200)
        model(ids, past_key_values=cache)
        model.quarot_graph = replayed
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
        counts.append(kernels(model, cache, ids[:, :1]))
        assert graphs(model) == replayed
    assert 10 <= (counts[1] - counts[0]) / 2 <= 11
