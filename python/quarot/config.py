"""What a conversion does, as data: one frozen dataclass and the grammar of its named presets.

The dictionary form (`to_dict` / `from_dict`) is what stands under `quantization_config` in a
checkpoint's config.json, so a field's name and meaning are part of the checkpoint format.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

FORMAT_VERSION = 1
"""Version of the checkpoint format; a reader refuses a newer one."""

SITES = ("qkv", "o", "up_gate", "down", "k", "v")
"""Where a layer quantizes at run time: the inputs of its four linears, and the two KV caches."""

_WEIGHT_BITS = (4, 16)
_ACTIVATION_BITS = (4, 8, 16)
_KV_BITS = (4, 8, 16)
WEIGHT_GROUPS = (0, 32, 64, 128, 256)
"""Columns that may share a weight scale; 0 = the whole row."""

_MAX_SEED = 2**53 - 1
"""What every reader of JSON keeps exactly; times the layers it is still a seed of torch's."""

_SWITCHES = ("w_clip_search", "a_symmetric", "r1", "r2", "r3", "r4", "head_hadamard")

_NO_ROTATION: dict[str, Any] = {
    "rotation": "none", "r1": False, "r2": False, "r3": False, "r4": False, "head_hadamard": False,
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    # QuaRot, arXiv 2404.00456 section 5: every rotation, round-to-nearest weights, clip 0.9 / 0.95.
    "quarot-rtn": {},
    # The same quantizers on the unrotated model: the baseline that shows what rotation is worth.
    "rtn": _NO_ROTATION,
}
DEFAULT_RECIPE = "quarot-rtn"

_PRESET = re.compile(r"W(\d+)A(\d+)KV(\d+)(?:-g(\d+))?(?:-([a-z][a-z-]*))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class QuarotConfig:
    """Describe a conversion.

    Args:
        w_bits: bits of a weight: 4, or 16 = left in the model's dtype.
        a_bits: bits of an activation at the input of a linear: 4, 8, or 16 = not quantized.
        kv_bits: bits of a cached key or value: 4, 8, or 16 = transformers' own cache.
        w_group: input columns that share a weight scale: 32, 64, 128, 256, or 0 = the whole row.
        w_clip_search: search each scale's shrink factor for the least error (else clip 1.0).
        w_clip_norm: exponent of that error (2.4 in QuaRot's code, 2 in its paper).
        a_symmetric: activations around zero (else with a zero point).
        a_clip: share of max|x| (of the range, when asymmetric) that activations keep, in (0, 1].
        kv_clip: the same for keys and values, which are always asymmetric.
        clips: overrides of the two above, site -> one ratio a layer; sites are `SITES`. Copied.
        rotation: matrix of R1 and R2: "hadamard" (random signs x Hadamard for R1, Hadamard for
            R2), "random" (random orthogonal), "given" (tensors handed to `rotate`), "none".
        r1, r2: fuse the residual-stream and the per-head rotation into the weights.
        r3: Hadamard of queries and keys after RoPE (only where the KV cache is quantized).
        r4: Hadamard of the down projection's input.
        head_hadamard: Hadamard across heads at the output projection's input.
        seed: seed of the random signs or matrices, below 2^53 (what it fixes:
            `hadamard.random_signs`, `hadamard.random_orthogonal`).
        recipe: the named recipe this came from.

    Raises:
        ValueError: names the field, what it got, and what it needs.
    """

    w_bits: int = 4
    a_bits: int = 4
    kv_bits: int = 4
    w_group: int = 0
    w_clip_search: bool = True
    w_clip_norm: float = 2.4
    a_symmetric: bool = True
    a_clip: float = 0.9
    kv_clip: float = 0.95
    clips: Mapping[str, Sequence[float]] | None = None
    rotation: str = "hadamard"
    r1: bool = True
    r2: bool = True
    r3: bool = True
    r4: bool = True
    head_hadamard: bool = True
    seed: int = 0
    recipe: str = DEFAULT_RECIPE
    quant_method: str = dataclasses.field(default="quarot", init=False)

    def __post_init__(self) -> None:
        _one_of("w_bits", self.w_bits, _WEIGHT_BITS)
        _one_of("a_bits", self.a_bits, _ACTIVATION_BITS)
        _one_of("kv_bits", self.kv_bits, _KV_BITS)
        _one_of("w_group", self.w_group, WEIGHT_GROUPS)
        _one_of("rotation", self.rotation, ("hadamard", "random", "given", "none"))
        _one_of("recipe", self.recipe, tuple(RECIPES))
        _ratio("a_clip", self.a_clip)
        _ratio("kv_clip", self.kv_clip)
        if not (_is_number(self.w_clip_norm) and 0 < self.w_clip_norm < math.inf):
            raise ValueError(f"w_clip_norm: got {self.w_clip_norm!r}, needs a number above 0")
        if self.w_group and self.w_bits == 16:
            raise ValueError(f"w_group: got {self.w_group} with w_bits 16, needs 0 or w_bits 4")
        if type(self.seed) is not int or not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"seed: got {self.seed!r}, needs an integer from 0 to 2^53 - 1")
        if self.rotation == "none" and (self.r1 or self.r2):
            raise ValueError('rotation: got "none" with r1 or r2 on; needs both off, or a matrix')
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, needs true or false")
        if self.clips is not None and not isinstance(self.clips, Mapping):
            raise ValueError(f"clips: got {self.clips!r}, needs a mapping of sites to ratios")
        for site, ratios in (self.clips or {}).items():
            _one_of("clips", site, SITES)
            if not isinstance(ratios, (list, tuple)):
                raise ValueError(f"clips[{site!r}]: got {ratios!r}, needs one ratio for each layer")
            for ratio in ratios:
                _ratio(f"clips[{site!r}]", ratio)
        if self.clips is not None:  # a copy: the caller's lists may change later
            clips = {site: tuple(ratios) for site, ratios in self.clips.items()}
            object.__setattr__(self, "clips", clips)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> QuarotConfig:
        """Parse a preset `W4A4KV4[-gN][-RECIPE]`; keyword arguments override single fields."""
        match = _PRESET.fullmatch(preset)
        if match is None:
            raise ValueError(
                f"preset: got {preset!r}, needs W<bits>A<bits>KV<bits>[-g<group>][-<recipe>], "
                f"such as W4A4KV4, W4A8KV4-g128 or W4A4KV4-rtn (recipes: {', '.join(RECIPES)})"
            )
        w_bits, a_bits, kv_bits, group, recipe = match.groups(default="")
        recipe = recipe or DEFAULT_RECIPE
        _one_of("preset recipe", recipe, tuple(RECIPES))
        fields = {"w_bits": int(w_bits), "a_bits": int(a_bits), "kv_bits": int(kv_bits)}
        for name in overrides:
            _one_of("override", name, tuple(f.name for f in dataclasses.fields(cls)))
        if group:
            fields["w_group"] = int(group)
        return cls(**{**RECIPES[recipe], **fields, "recipe": recipe, **overrides})

    @property
    def preset(self) -> str:
        """The preset this config would be written as (overridden fields do not show)."""
        bits = f"W{self.w_bits}A{self.a_bits}KV{self.kv_bits}"
        group = f"-g{self.w_group}" if self.w_group else ""
        recipe = f"-{self.recipe}" if self.recipe != DEFAULT_RECIPE else ""
        return bits + group + recipe

    def clip(self, site: str, layer: int) -> float:
        """Return the clip ratio of `site` (one of `SITES`) in layer `layer`."""
        _one_of("site", site, SITES)
        if self.clips and site in self.clips:
            return float(self.clips[site][layer])
        return self.kv_clip if site in ("k", "v") else self.a_clip

    def check_layers(self, layers: int) -> None:
        """Raise if a list in `clips` is not one ratio a layer."""
        for site, ratios in (self.clips or {}).items():
            if len(ratios) != layers:
                raise ValueError(
                    f"clips[{site!r}]: got {len(ratios)} ratios, needs one a layer, {layers} layers"
                )

    def replace(self, **fields: Any) -> QuarotConfig:
        """Return a copy with `fields` changed."""
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with `quant_method` and `format_version`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.clips is not None:
            fields["clips"] = {site: list(ratios) for site, ratios in self.clips.items()}
        return {**fields, "format_version": FORMAT_VERSION}

    def to_json_string(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, complete: bool = False) -> QuarotConfig:
        """Rebuild a config from `to_dict`'s form; unknown fields and newer formats are errors.

        Args:
            complete: whether every field must be there, as in a checkpoint, whose meaning may not
                depend on this version's defaults; else missing ones get their defaults.
        """
        if complete and (missing := sorted(cls().to_dict().keys() - fields.keys())):
            raise ValueError(f"quantization_config: lacks {missing}, needs every field")
        fields = dict(fields)
        method = fields.pop("quant_method", "quarot")
        if method != "quarot":
            raise ValueError(f"quant_method: got {method!r}, needs 'quarot'")
        version = fields.pop("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version: got {version!r}, this quarot reads 1 to {FORMAT_VERSION}; "
                "a newer checkpoint needs a newer quarot"
            )
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        unknown = sorted(fields.keys() - known)
        if unknown:
            raise ValueError(
                f"quantization_config: unknown fields {unknown}; known: {sorted(known)}"
            )
        return cls(**fields)


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:  # 4.0 and True are no 4 and 1
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(str, allowed))}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ratio(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}: got {value!r}, needs a ratio in (0, 1]")
