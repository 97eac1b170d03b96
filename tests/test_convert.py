"""The conversion pipeline: what it computes, what it refuses, what it leaves behind."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, LlamaForSequenceClassification
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

import quarot
from helpers import MODEL_SHAPES, tiny_model
from quarot import QuarotConfig, hf, ops
from quarot.modules.decoder_layer import DecoderLayer
from quarot.quantize import rtn

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))


def convert(model, config="W4A4KV4", **options):
    return quarot.convert(model, config, progress=False, **options)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# --- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_rotation_alone_keeps_the_logits(shape):
    model = tiny_model(**MODEL_SHAPES[shape])
    expected = logits(model)
    assert error(logits(convert(model, "W16A16KV16")), expected) < 1e-5


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_rotation_changes_every_matrix(rotation):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    after = convert(model, QuarotConfig(16, 16, 16, rotation=rotation)).state_dict()
    assert before.keys() == after.keys()
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert unchanged == []


@pytest.mark.parametrize("shape", ["gqa", "bias", "qwen2-tied"])
@pytest.mark.parametrize("group", ["", "-g32"])
def test_quantized_weights_are_those_of_the_right_linears(shape, group):
    """Against transformers' own layers on the dequantized weights, without rotation."""
    expected, model = tiny_model(**MODEL_SHAPES[shape]), tiny_model(**MODEL_SHAPES[shape])
    convert(model, f"W4A16KV16{group}-rtn")
    stored = model.state_dict()
    for name, module in expected.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            path = f"model.layers.{name}"
            codes = ops.unpack_int4(stored[f"{path}.weight_packed"])
            scale = stored[f"{path}.weight_scale"]
            grouped = codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
            assert error(grouped.flatten(1), module.weight) < 0.2
            module.weight.data = grouped.flatten(1)
    assert error(logits(model), logits(expected)) < 1e-5


def test_forms_of_the_config_are_equal():
    forms = "W4A8KV4", QuarotConfig(a_bits=8), QuarotConfig(a_bits=8).to_dict()
    results = [logits(convert(tiny_model(), form)) for form in forms]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_seed_is_reproducible_and_only_for_presets():
    def packed(*arguments, **options):
        state = convert(tiny_model(), *arguments, **options).state_dict()
        return state["model.layers.0.mlp.up_proj.weight_packed"]

    assert torch.equal(packed("W4A4KV4", seed=3), packed("W4A4KV4", seed=3))
    assert not torch.equal(packed("W4A4KV4", seed=3), packed("W4A4KV4", seed=4))
    assert torch.equal(packed(QuarotConfig(seed=3), seed=4), packed("W4A4KV4", seed=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_dtype(dtype):
    model = convert(tiny_model(dtype=dtype), "W4A8KV4")
    assert model.dtype == dtype and logits(model).dtype == dtype
    assert logits(model).isfinite().all()
    scales = [t for n, t in model.state_dict().items() if n.endswith("weight_scale")]
    assert scales and all(scale.dtype == torch.float32 for scale in scales)


def test_returns_the_same_model_ready_for_inference():
    model = tiny_model().train()
    assert convert(model) is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(isinstance(layer, DecoderLayer) for layer in model.model.layers)
    assert model.config.quantization_config == QuarotConfig()


def test_rtn_leaves_embeddings_tied_and_untouched():
    model = tiny_model(tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    convert(model, "W4A4KV4-rtn")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)


def test_hooks_of_a_dispatched_model_stay():
    """accelerate's, which move a layer's inputs to its device; here, they only count calls."""

    class Count(AlignDevicesHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            assert isinstance(module, DecoderLayer)
            return super().pre_forward(module, *args, **kwargs)

    model = tiny_model()
    hooks = [Count(execution_device="cpu") for _ in model.model.layers]
    for layer, hook in zip(model.model.layers, hooks, strict=True):
        attach_execution_device_hook(layer, "cpu")  # on everything below, as dispatch_model does
        add_hook_to_module(layer, hook)
    convert(model)
    assert torch.equal(logits(model), logits(convert(tiny_model())))
    assert [hook.calls for hook in hooks] == [1, 1]


# --- memory -------------------------------------------------------------------------------------


def test_old_weights_are_freed_layer_by_layer(monkeypatch):
    model = tiny_model(num_hidden_layers=3)
    arch_linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    alive = [weakref.ref(module.weight) for module in arch_linears]
    del arch_linears
    seen = []
    quantize = rtn.quantize_weight

    def watch(weight, config):
        seen.append(sum(ref() is not None for ref in alive))
        return quantize(weight, config)

    monkeypatch.setattr(rtn, "quantize_weight", watch)
    convert(model)
    # Of 21 linears, one less at every step, the one at work included.
    assert seen == list(range(20, -1, -1))


def test_quantized_linears_take_a_quarter_of_bf16():
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    model = tiny_model(**shape, num_key_value_heads=3, num_hidden_layers=1, dtype=torch.bfloat16)
    before = hf.weight_bytes(model)
    elements = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
    assert before == 2 * elements
    convert(model)
    assert elements // 2 < hf.weight_bytes(model) <= 0.255 * before
    # Nothing else holds a copy: what the layers keep in all is that, and two norms.
    held = {
        t.data_ptr(): t.nbytes
        for t in (*model.model.layers.buffers(), *model.model.layers.parameters())
    }
    assert sum(held.values()) <= hf.weight_bytes(model) + 2 * 576 * 4


# --- what it refuses ----------------------------------------------------------------------------


def _nan(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")


def _mixed(model):
    model.model.norm.to(torch.bfloat16)


def _adapter(model):
    model.model.layers[0].self_attn.q_proj = nn.Sequential(model.model.layers[0].self_attn.q_proj)


def _wrong_shape(model):
    model.model.layers[1].mlp.gate_proj = nn.Linear(64, 64, bias=False)


def _meta(model):
    model.to("meta")


def _extra(model):
    model.model.layers[1].self_attn.q_norm = nn.RMSNorm(16)


def _other_type(model):
    model.config.model_type = "gpt2"


def _offloaded(model):
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}


REFUSALS = {
    "nan": (_nan, "W4A4KV4", r"model\.layers\.1\.mlp\.down_proj\.weight.*not finite"),
    "mixed": (_mixed, "W4A4KV4", "needs one dtype"),
    "float64": (lambda model: model.double(), "W4A4KV4", "float64"),
    "adapter": (_adapter, "W4A4KV4", r"layers\.0\b.*q_proj"),
    "shape": (_wrong_shape, "W4A4KV4", r"layers\.1\.mlp\.gate_proj\.weight is \[64, 64\], needs"),
    "meta": (_meta, "W4A4KV4", "meta device"),
    "extra": (_extra, "W4A4KV4", r"layers\.1 has self_attn\.q_norm"),
    "type": (_other_type, "W4A4KV4", "'gpt2', needs one of"),
    "offloaded": (_offloaded, "W4A4KV4", "offload"),
    "group": (
        lambda model: None,
        "W4A4KV4-g64",
        r"model\.layers\.0\.mlp\.down_proj: group: got 64 for 96 input columns, .*\(32\)",
    ),
    "clips": (
        lambda model: None,
        QuarotConfig(clips={"qkv": [0.9]}),
        "needs one a layer, 2 layers",
    ),
    "given": (lambda model: None, QuarotConfig(rotation="given"), "given"),
    "preset": (lambda model: None, "W3A4KV4", "w_bits: got 3"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_the_model_untouched(name):
    spoil, config, message = REFUSALS[name]
    model = tiny_model()
    spoil(model)
    kinds = [type(module) for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fields = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        convert(model, config)
    assert [type(module) for module in model.modules()] == kinds
    assert model.config.to_dict() == fields
    if name != "meta":
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]) or tensor.isnan().any()


def test_columns_that_the_kernel_cannot_read_are_named():
    model = tiny_model(intermediate_size=80)
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.down_proj.* 80 input columns.* of 32"
    ):
        convert(model)
    convert(model, "W16A8KV4")  # no int4 weights, no such limit


@pytest.mark.parametrize("head_dim", [20, 36, 320])
@pytest.mark.parametrize("kv_bits", [4, 8])
def test_heads_that_the_cache_cannot_store_are_named(head_dim, kv_bits):
    model = tiny_model(head_dim=head_dim)
    before = copy.deepcopy(model.state_dict())
    message = f"head_dim: got {head_dim}, .* multiple of 8, at most 256"
    with pytest.raises(ValueError, match=message):
        convert(model, QuarotConfig(w_bits=16, kv_bits=kv_bits))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        hf.install_layers(tiny_model(head_dim=head_dim), QuarotConfig(w_bits=16, kv_bits=kv_bits))
    assert logits(convert(model, "W16A8KV16")).isfinite().all()


def test_the_cache_stores_the_heads_that_the_kernels_take():
    """The bounds stand in C++ too: at them a forward must run."""
    for head_dim in (8, 24, 256):
        assert logits(convert(tiny_model(head_dim=head_dim), "W16A8KV4")).isfinite().all()


def test_the_callers_config_stays_as_it_was():
    """It may serve other models; what a converted model's config builds says how to run it."""
    model = tiny_model(tie_word_embeddings=True)
    shared, before = model.config, model.config.to_dict()
    convert(model)
    assert shared.to_dict() == before
    again = type(tiny_model())(shared).eval()
    assert logits(again).isfinite().all()
    assert all(getattr(m, "config", None) is not shared for m in model.modules())
    other = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa").eval()
    assert logits(other).isfinite().all()


def test_refuses_what_is_quantized_already():
    model = convert(tiny_model())
    with pytest.raises(ValueError, match="already converted"):
        convert(model)
    assert logits(model).isfinite().all()


def test_refuses_models_without_a_head():
    config = tiny_model().config
    for model in (LlamaForSequenceClassification(config), tiny_model().model, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="needs a"):
            convert(model)


@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"config": 4}])
def test_refuses_wrong_arguments(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        convert(tiny_model(), **options)


# --- failure after the first change -------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_failure_half_way_makes_the_model_unusable(monkeypatch, tmp_path, failure):
    calls = []
    quantize = rtn.quantize_weight

    def fail_in_the_second_layer(weight, config):
        calls.append(weight)
        if len(calls) > 10:
            raise failure
        return quantize(weight, config)

    monkeypatch.setattr(rtn, "quantize_weight", fail_in_the_second_layer)
    model = tiny_model()
    with pytest.raises(type(failure)):
        convert(model)
    uses = {
        "forward": lambda m: m(IDS),
        "generate": lambda m: m.generate(IDS, max_new_tokens=2),
        "save": lambda m: m.save_pretrained(tmp_path),
        "state dict": lambda m: m.state_dict(),
        "decoder": lambda m: m.model(IDS),
        "decoder's state dict": lambda m: m.model.state_dict(),
        "convert": lambda m: convert(m),
    }
    for use in uses.values():
        for broken in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(
                (RuntimeError, ValueError), match="unusable.*" + type(failure).__name__
            ):
                use(broken)
    assert not list(tmp_path.iterdir())


# --- what the user sees -------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(capfd, progress):
    quarot.convert(tiny_model(), "W4A8KV4", progress=progress)
    captured = capfd.readouterr()
    assert ("W4A8KV4" in captured.err and "2/2" in captured.err) == progress
    assert captured.out == ""


def test_log_names_what_stays_unrotated(caplog):
    with caplog.at_level(logging.INFO, logger="quarot"):
        convert(tiny_model(**MODEL_SHAPES["9-heads"]))
    assert [r.levelname for r in caplog.records if "heads (head Hadamard): 9" in r.message] == [
        "WARNING"
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="quarot"):
        convert(tiny_model(intermediate_size=46), "W16A16KV16")
        convert(tiny_model(**MODEL_SHAPES["9-heads"]), "W4A4KV4-rtn")
    assert [r.message for r in caplog.records if "rotated" in r.message] == [
        "intermediate size (R4): 46 is rotated in blocks of 2"
    ]


def test_gguf_quantizer_is_replaced(tmp_path):
    """transformers leaves one on models it dequantized from GGUF; it refuses to save."""
    model = tiny_model()
    model.hf_quantizer = GgufHfQuantizer(GgufConfig())
    model.config.quantization_config = GgufConfig()
    convert(model)
    assert isinstance(model.hf_quantizer, hf.QuarotQuantizer)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(quarot.load(tmp_path)), logits(model))
