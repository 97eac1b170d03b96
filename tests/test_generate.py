"""`generate` and its relatives on converted models.

A4 and A8 models are chaotic at rounding level (CONTRIBUTING.md), so text is compared only where
nothing is quantized at run time (W16A16KV16, W4A16KV16); with the int4 cache the tests check
logits within the noise of a code that flips, at 8 bits and 16-bit activations, and else properties.
"""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
    pipeline,
)

import quarot
from helpers import NO_CUDA, tiny_model
from quarot.cache import QuantizedLayer

IDS = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(7))
NEW = 12
# Deterministic and never cut short, so that lengths can be checked.
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "contrast": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def original():
    return tiny_model()


@pytest.fixture(scope="module")
def rotated():
    """Rotated, nothing quantized: generates what the original does."""
    return quarot.convert(tiny_model(), "W16A16KV16", progress=False)


@pytest.fixture(scope="module")
def cached():
    """Only the KV cache quantized, to 8 bits: small errors, but through our cache and kernels."""
    return quarot.convert(tiny_model(), "W16A16KV8", progress=False)


@pytest.fixture(scope="module")
def quantized():
    return quarot.convert(tiny_model(), "W4A4KV4", progress=False)


def generate(model, ids=IDS, **options):
    torch.manual_seed(0)
    return model.generate(ids, **{**GREEDY, **options})


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def near(got, expected):
    """Within the noise that flipped 8-bit codes make in logits of size one."""
    return (got - expected).abs().max().item() < 0.1 * expected.std().item()


# --- nothing quantized at run time: the same text -----------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rotated_model_generates_the_same_text(original, rotated, mode):
    expected = generate(original, **MODES[mode])
    assert torch.equal(generate(rotated, **MODES[mode]), expected)


def test_rotated_model_generates_the_same_ragged_batch(original, rotated):
    ids, mask = padded(IDS[0, :5], IDS[0, 3:12])
    for options in ({}, {"num_beams": 2}):
        expected = generate(original, ids, attention_mask=mask, **options)
        assert torch.equal(generate(rotated, ids, attention_mask=mask, **options), expected)


def test_rotated_model_assists_and_is_assisted(original, rotated):
    expected = generate(original)
    assert torch.equal(generate(rotated, assistant_model=original), expected)
    assert torch.equal(generate(original, assistant_model=rotated), expected)


# --- the quantized cache ------------------------------------------------------------------------


def padded(*rows):
    """Stack rows of ids with padding (id 0) on the left; return ids and mask."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return ids, mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["cached", "quantized"])
def test_every_mode_runs_and_repeats(request, model, mode):
    model = request.getfixturevalue(model)
    options = {"return_dict_in_generate": True, **MODES[mode]}
    result = generate(model, **options)
    rows = MODES[mode].get("num_return_sequences", 1)
    assert result.sequences.shape == (rows, IDS.shape[1] + NEW)
    assert torch.equal(result.sequences[:, : IDS.shape[1]], IDS.expand(rows, -1))
    assert torch.equal(generate(model, **options).sequences, result.sequences)
    if MODES[mode].get("use_cache", True):
        layers = result.past_key_values.layers
        assert all(isinstance(layer, QuantizedLayer) for layer in layers)
        assert layers[0].get_seq_length() >= IDS.shape[1] + NEW - 1


def test_prefill_and_decode_agree(cached):
    """Token by token through the cache, against all at once."""
    expected = logits(cached, IDS)
    cache, steps = DynamicCache(), []
    for position in range(IDS.shape[1]):
        steps.append(logits(cached, IDS[:, position : position + 1], past_key_values=cache))
    assert near(torch.cat(steps, 1), expected)


def test_padding_on_the_left_changes_nothing(cached):
    short, long = IDS[0, :5], IDS[0]
    ids, mask = padded(short, long)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = logits(cached, ids, attention_mask=mask, position_ids=positions)
    assert batch.isfinite().all()
    assert near(batch[0, -5:], logits(cached, short[None])[0])
    assert near(batch[1], logits(cached, long[None])[0])


def test_content_of_padding_has_no_influence(quantized):
    """Bit by bit even at W4A4: padded keys are masked, and rows do not see each other."""
    ids, mask = padded(IDS[0, :5], IDS[0])
    other = torch.where(mask.bool(), ids, 77)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    one, two = logits(quantized, ids, **options), logits(quantized, other, **options)
    assert torch.equal(one[0, -5:], two[0, -5:]) and torch.equal(one[1], two[1])


def test_batch_of_ragged_prompts_generates(quantized):
    ids, mask = padded(IDS[0, :5], IDS[0, 2:9], IDS[0])
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        out = generate(quantized, ids, attention_mask=mask, **options)
        assert out.shape == (3, IDS.shape[1] + NEW)
        assert torch.equal(out[:, : IDS.shape[1]], ids)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_serves_several_turns(cached, kind):
    def fresh():
        return DynamicCache() if kind == "dynamic" else StaticCache(cached.config, max_cache_len=64)

    cache = fresh()
    first = generate(cached, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    turn = torch.cat([first, IDS.flip(1)], 1)
    second = generate(
        cached, turn, past_key_values=cache, return_dict_in_generate=True, output_logits=True
    )
    assert cache.get_seq_length() == turn.shape[1] + NEW - 1
    assert near(second.logits[0], logits(cached, turn)[:, -1])


def test_a_prompt_cache_can_be_copied(cached):
    cache = DynamicCache()
    logits(cached, IDS[:, :8], past_key_values=cache)
    ends = (IDS[:, 8:], IDS[:, 8:].flip(1))
    for end in ends:
        got = logits(cached, end, past_key_values=copy.deepcopy(cache))
        assert near(got, logits(cached, torch.cat([IDS[:, :8], end], 1))[:, 8:])
    assert cache.get_seq_length() == 8


def test_cropping_goes_back(cached):
    cache = DynamicCache()
    logits(cached, IDS, past_key_values=cache)
    cache.crop(8 - IDS.shape[1])
    assert cache.get_seq_length() == 8
    assert near(logits(cached, IDS[:, 8:], past_key_values=cache), logits(cached, IDS)[:, 8:])


def test_assisted_decoding(original, quantized):
    for model, assistant in ((quantized, original), (original, quantized)):
        out = generate(model, assistant_model=assistant)
        assert out.shape == (1, IDS.shape[1] + NEW)
    assert torch.equal(generate(original, assistant_model=quantized), generate(original))


def test_a_full_static_cache_is_an_error(quantized):
    cache = StaticCache(quantized.config, max_cache_len=IDS.shape[1] + 3)
    with pytest.raises(ValueError, match="max_cache_len"):
        generate(quantized, past_key_values=cache)


def test_a_foreign_cache_is_an_error(original, quantized):
    cache = DynamicCache()
    logits(original, IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="unquantized keys"):
        logits(quantized, IDS, past_key_values=cache)


def test_output_of_attention_weights_is_an_error(quantized):
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match="output_attentions"):
        quantized(IDS, output_attentions=True)


# --- our own loop -------------------------------------------------------------------------------

LOOP = {"custom_generate": quarot.generate}
LOOPS = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 0.8},
    "top_k": {"do_sample": True, "top_k": 20},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static"},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "end": {"min_new_tokens": 3, "eos_token_id": list(range(3, 128, 4))},
    "chunks": {"prefill_chunk_size": 5},
}


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.given, self.ended = [], False

    def put(self, tokens):
        assert tokens.device.type == "cpu"
        self.given.append(tokens)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", LOOPS)
@pytest.mark.parametrize("model", ["original", "rotated", "cached", "quantized"])
def test_own_loop_generates_the_same_text(request, model, mode):
    model = request.getfixturevalue(model)
    expected = generate(model, **LOOPS[mode])
    assert torch.equal(generate(model, **LOOP, **LOOPS[mode]), expected)


@pytest.mark.parametrize("mode", ["greedy", "top_k", "static", "end"])
@pytest.mark.parametrize("model", ["original", "rotated", "quantized"])
def test_own_loop_with_padding(request, model, mode):
    model = request.getfixturevalue(model)
    ids, mask = padded(IDS[0, :5], IDS[0, 2:9], IDS[0])
    options = {"attention_mask": mask, **LOOPS[mode]}
    expected = generate(model, ids, **options)
    assert torch.equal(generate(model, ids, **LOOP, **options), expected)


def test_own_loop_streams(quantized, original):
    streamer = Recorder()
    out = generate(quantized, **LOOP, streamer=streamer)
    assert torch.equal(torch.cat([streamer.given[0][0], *streamer.given[1:]]), out[0])
    assert streamer.ended and len(streamer.given) == 1 + NEW
    streamer = Recorder()  # to a model that is not ours it comes in another way
    loop = functools.partial(quarot.generate, streamer=streamer)
    assert torch.equal(generate(original, custom_generate=loop), generate(original))
    assert streamer.ended and len(streamer.given) == 1 + NEW


def test_own_loop_asks_other_stopping_criteria(quantized):
    class Enough(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.tensor([ids.shape[1] >= IDS.shape[1] + 3] * len(ids))

    out = generate(quantized, **LOOP, min_new_tokens=0, stopping_criteria=[Enough()])
    assert torch.equal(out, generate(quantized)[:, : IDS.shape[1] + 3])


@pytest.mark.parametrize("loop", [{}, LOOP])
def test_a_streamer_that_raises_leaves_model_and_cache_usable(cached, loop):
    class Cancel(Recorder):
        def put(self, tokens):
            super().put(tokens)
            if len(self.given) == 5:
                raise InterruptedError

    expected, cache = generate(cached), DynamicCache()
    with pytest.raises(InterruptedError):
        generate(cached, past_key_values=cache, streamer=Cancel(), **loop)
    assert cache.get_seq_length() == IDS.shape[1] + 3
    seen = expected[:, : IDS.shape[1] + 4]
    rest = generate(cached, seen, past_key_values=cache, max_new_tokens=NEW - 4, min_new_tokens=0)
    assert torch.equal(rest, expected)
    assert torch.equal(generate(cached, **loop), expected)


def test_own_loop_serves_several_turns(cached):
    caches = DynamicCache(), DynamicCache()
    first = generate(cached, past_key_values=caches[0])
    assert torch.equal(generate(cached, past_key_values=caches[1], **LOOP), first)
    turn = torch.cat([first, IDS.flip(1)], 1)
    second = generate(cached, turn, past_key_values=caches[0])
    assert torch.equal(generate(cached, turn, past_key_values=caches[1], **LOOP), second)
    assert caches[1].get_seq_length() == second.shape[1] - 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache"),
    ],
)
def test_own_loop_refuses_what_it_cannot_do(quantized, options, named):
    with pytest.raises(ValueError, match=named):
        generate(quantized, **LOOP, **options)


def test_own_loop_refuses_an_assistant(quantized, original):
    with pytest.raises(ValueError, match="assistant_model"):
        generate(quantized, **LOOP, assistant_model=original)


def test_nothing_grows_with_the_tokens(quantized):
    """The objects that exist while a text is generated: as many after 40 tokens as after 400."""
    counts = []

    class Count(Recorder):
        def put(self, tokens):
            if tokens.ndim == 1:
                counts.append(len(gc.get_objects()))

    gc.collect()
    gc.disable()  # what is counted must go by itself
    try:
        cache = StaticCache(quantized.config, max_cache_len=500)
        options = {"max_new_tokens": 400, "min_new_tokens": 400, "past_key_values": cache}
        generate(quantized, streamer=Count(), **options, **LOOP)
    finally:
        gc.enable()
    assert counts[-1] - counts[40] <= 20


# --- text in, text out --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, with a chat template."""
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *"abcdefghijklmnopqrstuvwxyz .:",
        *map(str, range(95)),
    ]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side="left", **names)
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return fast


def test_chat_template(quantized, tokenizer):
    chat = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = quantized.generate(**inputs, **GREEDY)
    assert out.shape[1] == inputs["input_ids"].shape[1] + NEW


def test_streamer_sees_the_text_that_generate_returns(quantized, tokenizer, capsys):
    inputs = tokenizer("hello", return_tensors="pt")
    out = quantized.generate(**inputs, **GREEDY, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(out[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(quantized, tokenizer, batch_size):
    pipe = pipeline("text-generation", model=quantized, tokenizer=tokenizer, batch_size=batch_size)
    prompts = ["hello", "a longer prompt"]
    for prompt, result in zip(prompts, pipe(prompts, **GREEDY), strict=True):
        assert len(tokenizer(result[0]["generated_text"])["input_ids"]) > len(prompt)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("preset", ["W4A4KV4", "W4A8KV8", "W16A16KV16"])
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, LOOP]
)
def test_on_a_gpu(preset, options):
    """Converted there, it generates there, twice the same; unquantized what the original does."""
    device = torch.device("cuda")
    model = quarot.convert(tiny_model().to(device), preset, progress=False)
    ids = IDS.to(device)
    out = generate(model, ids, **options)
    assert out.device.type == "cuda" and out.shape == (1, IDS.shape[1] + NEW)
    assert torch.equal(out, generate(model, ids, **options))
    if preset == "W16A16KV16":
        assert torch.equal(out, generate(tiny_model().to(device), ids, **options))
