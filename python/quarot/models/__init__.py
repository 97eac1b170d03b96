"""The registry of architectures: a new family is one file here and one entry below."""

from typing import Any

from quarot.models.base import Architecture, Geometry
from quarot.models.llama import LLAMA
from quarot.models.qwen import QWEN2

__all__ = ["ARCHITECTURES", "Architecture", "Geometry", "describe"]

ARCHITECTURES: dict[str, Architecture] = {a.model_type: a for a in (LLAMA, QWEN2)}


def describe(config: Any) -> Architecture:
    """Return the architecture of a transformers config; ValueError if it is not in the registry."""
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model: got model_type {model_type!r}, needs one of {sorted(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
