"""config.py: the preset grammar, every refusal, and the dictionary form."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarot.config import FORMAT_VERSION, RECIPES, SITES, QuarotConfig


def test_default_is_the_default_preset() -> None:
    assert QuarotConfig() == QuarotConfig.from_preset("W4A4KV4")
    assert QuarotConfig().preset == "W4A4KV4"


def test_preset_sets_exactly_what_it_names() -> None:
    config = QuarotConfig.from_preset("W4A8KV16-g128")
    assert config == QuarotConfig(w_bits=4, a_bits=8, kv_bits=16, w_group=128)


def test_rtn_recipe_has_no_rotation() -> None:
    config = QuarotConfig.from_preset("W4A4KV4-rtn")
    assert config.rotation == "none"
    assert not (config.r1 or config.r2 or config.r3 or config.r4 or config.head_hadamard)
    # The baseline differs from the default in rotation only, or the comparison means nothing.
    rotations = {"rotation", "r1", "r2", "r3", "r4", "head_hadamard", "recipe"}
    default = QuarotConfig().to_dict()
    assert {k for k, v in config.to_dict().items() if v != default[k]} == rotations


@given(
    w=st.sampled_from([4, 16]),
    a=st.sampled_from([4, 8, 16]),
    kv=st.sampled_from([4, 8, 16]),
    group=st.sampled_from([0, 32, 64, 128, 256]),
    recipe=st.sampled_from(list(RECIPES)),
)
def test_preset_is_the_inverse_of_from_preset(
    w: int, a: int, kv: int, group: int, recipe: str
) -> None:
    group = group if w == 4 else 0
    text = f"W{w}A{a}KV{kv}" + (f"-g{group}" if group else "")
    config = QuarotConfig.from_preset(f"{text}-{recipe}")
    assert (config.w_bits, config.a_bits, config.kv_bits, config.w_group) == (w, a, kv, group)
    assert config.recipe == recipe
    assert QuarotConfig.from_preset(config.preset) == config
    if recipe == "quarot-rtn":
        assert config.preset == text, "the default recipe is not written"


def test_preset_overrides_single_fields() -> None:
    config = QuarotConfig.from_preset("W4A4KV4", a_clip=0.8, seed=3, r3=False)
    assert config == QuarotConfig(a_clip=0.8, seed=3, r3=False)
    with pytest.raises(ValueError, match="override: got 'aclip', needs one of .*a_clip"):
        QuarotConfig.from_preset("W4A4KV4", aclip=0.8)


@pytest.mark.parametrize(
    "preset",
    ["", "w4a4kv4", "W4A4", "W4A4KV4-", "W4A4KV4-g128-", "W4A4KV4-rtn-g128", " W4A4KV4",
     "W4A4KV4\n", "W-4A4KV4", "W\u0664A4KV4", "none"],
)  # fmt: skip
def test_malformed_preset_is_refused(preset: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"preset: got {preset!r}, needs W<bits>A<bits>")
    ):
        QuarotConfig.from_preset(preset)


@pytest.mark.parametrize(
    ("preset", "name"),
    [("W3A4KV4", "w_bits"), ("W8A8KV4", "w_bits"), ("W4A6KV4", "a_bits"), ("W4A4KV2", "kv_bits"),
     ("W4A4KV4-g100", "w_group"), ("W4A4KV4-nonsense", "preset recipe"),
     ("W4A4KV4-g", "preset recipe")],
)  # fmt: skip
def test_well_formed_preset_without_a_store_or_recipe_is_refused(preset: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs one of "):
        QuarotConfig.from_preset(preset)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"w_bits": 5}, "w_bits"),
        ({"w_bits": True}, "w_bits"),
        ({"w_bits": 4.0}, "w_bits"),
        ({"kv_bits": 16.0}, "kv_bits"),
        ({"w_group": 0.0}, "w_group"),
        ({"rotation": ["none"]}, "rotation"),
        ({"a_bits": 3}, "a_bits"),
        ({"kv_bits": 2}, "kv_bits"),
        ({"w_group": 16}, "w_group"),
        ({"w_group": False}, "w_group"),
        ({"rotation": "hadamrad"}, "rotation"),
        ({"recipe": "gptq4"}, "recipe"),
        ({"a_clip": 0.0}, "a_clip"),
        ({"a_clip": 1.01}, "a_clip"),
        ({"a_clip": float("nan")}, "a_clip"),
        ({"kv_clip": -0.5}, "kv_clip"),
        ({"w_clip_norm": 0}, "w_clip_norm"),
        ({"w_clip_norm": float("nan")}, "w_clip_norm"),
        ({"w_clip_norm": float("inf")}, "w_clip_norm"),
        ({"w_clip_norm": "2"}, "w_clip_norm"),
        ({"a_clip": "0.9"}, "a_clip"),
        ({"a_clip": True}, "a_clip"),
        ({"r1": "false"}, "r1"),
        ({"a_symmetric": 1}, "a_symmetric"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"w_bits": 16, "w_group": 64}, "w_group"),
        ({"rotation": "none"}, "rotation"),
        ({"rotation": "none", "r1": False}, "rotation"),
        ({"clips": [0.9]}, "clips"),
        ({"clips": {"qkv": 0.9}}, "clips['qkv']"),
        ({"clips": {"qkv": ["0.9"]}}, "clips['qkv']"),
        ({"clips": {"gate": [0.9]}}, "clips"),
        ({"clips": {"qkv": [0.9, 0.0]}}, "clips['qkv']"),
    ],
)
def test_bad_field_is_named(fields: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: got "):
        QuarotConfig(**fields)


def test_online_hadamards_need_no_fused_matrix() -> None:
    config = QuarotConfig(rotation="none", r1=False, r2=False)
    assert config.r3 and config.r4 and config.head_hadamard


def test_clip_is_by_site_and_layer_with_overrides() -> None:
    config = QuarotConfig(clips={"o": [0.5, 0.6], "k": [0.7, 0.8]})
    assert [config.clip("o", i) for i in range(2)] == [0.5, 0.6]
    assert [config.clip("k", i) for i in range(2)] == [0.7, 0.8]
    assert [config.clip(site, 1) for site in ("qkv", "up_gate", "down")] == [0.9, 0.9, 0.9]
    assert config.clip("v", 0) == 0.95
    with pytest.raises(ValueError, match="^site: got 'gate', needs one of qkv, o, "):
        config.clip("gate", 0)


def test_check_layers_wants_one_ratio_a_layer() -> None:
    config = QuarotConfig(clips={site: [0.9] * 3 for site in SITES})
    config.check_layers(3)
    QuarotConfig().check_layers(3)
    with pytest.raises(ValueError, match=r"^clips\['qkv'\]: got 3 ratios, .* 4 layers"):
        config.check_layers(4)


def test_frozen_and_replace() -> None:
    config = QuarotConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.a_bits = 8  # type: ignore[misc]
    assert config.replace(a_bits=8) == QuarotConfig(a_bits=8)
    assert config.a_bits == 4
    with pytest.raises(ValueError, match="^a_bits: got 5"):
        config.replace(a_bits=5)


@given(
    a_bits=st.sampled_from([4, 8, 16]),
    w_group=st.sampled_from([0, 32, 128]),
    symmetric=st.booleans(),
    clip=st.floats(min_value=1e-6, max_value=1.0),
    seed=st.integers(min_value=0, max_value=2**53 - 1),
    clips=st.none() | st.dictionaries(st.sampled_from(SITES), st.lists(st.floats(0.1, 1.0))),
)
def test_dict_and_json_round_trip(
    a_bits: int, w_group: int, symmetric: bool, clip: float, seed: int, clips: dict | None
) -> None:
    config = QuarotConfig(
        a_bits=a_bits, w_group=w_group, a_symmetric=symmetric, a_clip=clip, seed=seed, clips=clips
    )
    assert QuarotConfig.from_dict(config.to_dict()) == config
    assert QuarotConfig.from_dict(json.loads(config.to_json_string())) == config


def test_dict_form_is_the_checkpoint_format() -> None:
    """Every field with its default: a change here changes what older checkpoints mean."""
    assert QuarotConfig().to_dict() == {
        "w_bits": 4,
        "a_bits": 4,
        "kv_bits": 4,
        "w_group": 0,
        "w_clip_search": True,
        "w_clip_norm": 2.4,
        "a_symmetric": True,
        "a_clip": 0.9,
        "kv_clip": 0.95,
        "clips": None,
        "rotation": "hadamard",
        "r1": True,
        "r2": True,
        "r3": True,
        "r4": True,
        "head_hadamard": True,
        "seed": 0,
        "recipe": "quarot-rtn",
        "quant_method": "quarot",
        "format_version": 1,
    }


def test_tuples_in_clips_become_lists_in_json() -> None:
    config = QuarotConfig(clips={"v": (0.9, 0.8)})
    assert config.to_dict()["clips"] == {"v": [0.9, 0.8]}
    assert QuarotConfig.from_dict(json.loads(config.to_json_string())) == config


def test_clips_are_the_configs_own() -> None:
    clips = {"v": [0.9, 0.8]}
    config = QuarotConfig(clips=clips)
    clips["v"][0] = 5.0
    clips["gate"] = [0.9]
    assert config.clips == {"v": (0.9, 0.8)}
    config.to_dict()["clips"]["v"][1] = 5.0
    assert config.clip("v", 0) == 0.9 and config.clip("v", 1) == 0.8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq"}, "^quant_method: got 'gptq'"),
        ({"format_version": FORMAT_VERSION + 1}, "^format_version: got 2, .*newer quarot"),
        ({"format_version": 0}, "^format_version: got 0"),
        ({"format_version": "1"}, "^format_version: got '1'"),
        ({"w_bitz": 4}, r"^quantization_config: unknown fields \['w_bitz'\]"),
        ({"w_bits": 3}, "^w_bits: got 3"),
    ],
)
def test_from_dict_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuarotConfig.from_dict({**QuarotConfig().to_dict(), **fields})


def test_a_checkpoints_fields_must_all_be_there() -> None:
    fields = QuarotConfig(a_bits=8).to_dict()
    assert QuarotConfig.from_dict(fields, complete=True) == QuarotConfig(a_bits=8)
    for name in fields:
        partial = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ValueError, match=rf"^quantization_config: lacks \['{name}'\]"):
            QuarotConfig.from_dict(partial, complete=True)
    del fields["format_version"], fields["a_clip"]
    with pytest.raises(ValueError, match=r"lacks \['a_clip', 'format_version'\]"):
        QuarotConfig.from_dict(fields, complete=True)
    assert QuarotConfig.from_dict({"a_bits": 8}) == QuarotConfig(a_bits=8), "by hand: as before"


def test_from_dict_leaves_its_argument_alone() -> None:
    fields = QuarotConfig().to_dict()
    QuarotConfig.from_dict(fields)
    assert fields == QuarotConfig().to_dict()
