"""Convert a loaded transformers model in place: rotate, quantize, put in our decoder layers.

The pipeline goes layer by layer, and a layer's old weights are freed as its codes are made, so that
memory never holds two copies of the model (the output head of a model with tied embeddings
excepted: rotation makes it a matrix of its own). Everything that can be known beforehand is checked
before the first change; a failure after it makes the model refuse to be used. Over 300 lines: half
of them are those checks, which belong beside what they protect.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from tqdm.auto import tqdm

from quarot import hadamard, hf, rotate
from quarot.config import QuarotConfig
from quarot.models import Architecture, Geometry, describe
from quarot.modules.canonical import DTYPES, linear_shapes, norm_shapes
from quarot.modules.decoder_layer import DecoderLayer
from quarot.modules.linear import backend_ops
from quarot.modules.swapped import swap_class
from quarot.quantize import rtn

logger = logging.getLogger("quarot")


def convert(
    model: Any,
    config: str | QuarotConfig | Mapping[str, Any] = "W4A4KV4",
    *,
    seed: int = 0,
    backend: str = "kernel",
    progress: bool = True,
) -> Any:
    """Convert a transformers causal LM in place to quantized weights, activations and KV cache.

    The model keeps its class, embeddings, output head and `generate`; its decoder layers become
    quarot's. The recipes are those of QuaRot (arXiv 2404.00456, sections 4 and 5).

    Args:
        model: a causal LM of a registered architecture (`quarot.models.ARCHITECTURES`), in
            bfloat16, float16 or float32, on one or more devices.
        config: a preset such as "W4A4KV4" or "W4A8KV4-g64-rtn", a `QuarotConfig`, or its
            dictionary form.
        seed: seed of the random rotation where `config` is a preset (other forms have their own).
        backend: "kernel", or "reference" = the executable specification in plain torch.
        progress: show a progress bar on stderr.

    Returns:
        The same model object, in eval mode, without gradients.

    Raises:
        ValueError: the model or the config does not fit; names what, and what would. The model is
            untouched.
        TypeError: `config` is of another type.
        Exception: anything that fails later; the model is then unusable and says so when used.
    """
    config = _resolve(config, seed)
    backend_ops(backend)  # raises on an unknown one
    arch, geometry = check(model, config)
    rotations = rotate.Rotations.from_config(config, geometry)
    _log_unrotated(config, geometry)
    try:
        _own_config(model)
        _forget_quantizer(model)
        _convert(model, config, arch, geometry, rotations, backend, progress)
        return hf.adopt(model, config)
    except BaseException as error:
        _make_unusable(model, model.get_submodule(arch.decoder), error)
        raise


hf.on_the_fly = convert


def _resolve(config: str | QuarotConfig | Mapping[str, Any], seed: int) -> QuarotConfig:
    if isinstance(config, str):
        return QuarotConfig.from_preset(config, seed=seed)
    if isinstance(config, QuarotConfig):
        return config
    if isinstance(config, Mapping):
        return QuarotConfig.from_dict(config)
    raise TypeError(
        f"config: got {type(config).__name__}, needs a preset, a QuarotConfig or its dictionary"
    )


@torch.no_grad()
def _convert(
    model: Any,
    config: QuarotConfig,
    arch: Architecture,
    geometry: Geometry,
    rotations: rotate.Rotations,
    backend: str,
    progress: bool,
) -> None:
    _renew_rotary(model.get_submodule(arch.rotary), model.config)
    rotate.rotate_embeddings(model, arch, rotations)
    rotate.rotate_head(model, arch, rotations)
    layers = model.get_submodule(arch.layers)
    steps = tqdm(range(len(layers)), desc=config.preset, unit="layer", disable=not progress)
    for index in steps:
        layer = layers[index]
        rotate.rotate_layer(layer, arch, geometry, rotations, index)
        new = quantize_layer(layer, arch, geometry, config, index, backend)
        if hook := getattr(layer, "_hf_hook", None):
            # accelerate's, on a model over several devices: it brings the inputs to the layer's.
            add_hook_to_module(new, hook)
        layers[index] = new


def _renew_rotary(rotary: Any, transformers_config: Any) -> None:
    """Undo what `model.to(torch.bfloat16)` did to the rotary frequencies: round them.

    They are in no checkpoint: a reloaded model has them in float32, and must compute the same.
    """
    for name, frequencies in type(rotary)(transformers_config).named_buffers():
        setattr(rotary, name, frequencies.to(getattr(rotary, name).device))


def quantize_layer(
    layer: Any,
    arch: Architecture,
    geometry: Geometry,
    config: QuarotConfig,
    index: int,
    backend: str,
) -> DecoderLayer:
    """Return the quantized twin of a (rotated) transformers layer, whose weights are freed."""
    dtype = layer.get_submodule(arch.q).weight.dtype
    # On the meta device: it takes over the tensors below instead of copying them.
    new = hf.new_layer(layer, arch, geometry, config, index, dtype, "meta", backend)
    state: dict[str, Tensor] = {}
    for path in arch.linears:
        linear = layer.get_submodule(path)
        weight, linear.weight = linear.weight.detach(), None
        if linear.bias is not None:
            state[f"{path}.bias"] = linear.bias.detach()
        if config.w_bits == 16:
            state[f"{path}.weight"] = weight
        else:
            codes, scale = rtn.quantize_weight(weight, config)
            state[f"{path}.weight_packed"], state[f"{path}.weight_scale"] = codes, scale
    for path in norm_shapes(arch, geometry):
        state[f"{path}.weight"] = layer.get_submodule(path).weight.detach()
    new.load_state_dict(state, assign=True)
    new.fuse()
    return new


# --- before the first change --------------------------------------------------------------------


def check(model: Any, config: QuarotConfig) -> tuple[Architecture, Geometry]:
    """Raise ValueError if `model` cannot be converted by `config`; change nothing."""
    transformers_config = getattr(model, "config", None)
    if transformers_config is None or not hasattr(model, "get_submodule"):
        raise ValueError(f"model: got {type(model).__name__}, needs a transformers causal LM")
    if reason := getattr(model, "_quarot_unusable", None):
        raise ValueError(f"model: {reason}")
    arch = describe(transformers_config)
    _check_state(model, arch)
    geometry = arch.geometry(transformers_config)
    config.check_layers(geometry.layers)
    if config.rotation == "given":
        raise ValueError('rotation: got "given", which has no matrices here; use quarot.rotate')
    for index, layer in enumerate(model.get_submodule(arch.layers)):
        _check_layer(layer, index, arch, geometry, config)
    _check_tensors(model)
    return arch, geometry


def _check_state(model: Any, arch: Architecture) -> None:
    paths = (arch.embedding, arch.layers, arch.final_norm, arch.head)
    missing = [path for path in paths if not _has(model, path)]
    if missing:
        raise ValueError(
            f"model: {type(model).__name__} has no {', '.join(missing)}, needs a causal LM "
            "(AutoModelForCausalLM) without adapters or wrappers"
        )
    if any(isinstance(layer, DecoderLayer) for layer in model.get_submodule(arch.layers)):
        raise ValueError("model: is already converted by quarot; load the original model again")
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(method, "quant_method", None)
    if method is not None and str(getattr(method, "value", method)) != "gguf":
        raise ValueError(f"model: is already quantized by {method}; load it without quantization")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError("model: is offloaded (device_map); load it without offloading")


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _check_layer(
    layer: nn.Module,
    index: int,
    arch: Architecture,
    geometry: Geometry,
    config: QuarotConfig,
) -> None:
    """Check that a layer holds exactly what the architecture describes, and that it fits ours."""
    name = f"{arch.layers}.{index}"
    norms, linears = norm_shapes(arch, geometry), linear_shapes(arch, geometry)
    described = {f"{path}.weight" for path in (*linears, *norms)}
    described |= {f"{path}.bias" for path in linears}
    for path, shape in linears.items():
        linear = layer.get_submodule(path) if _has(layer, path) else None
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"model: {name}.{path} is a {type(linear).__name__}, needs a torch.nn.Linear "
                "(a model without adapters, loaded without quantization)"
            )
        if tuple(linear.weight.shape) != shape:
            raise ValueError(
                f"model: {name}.{path}.weight is {list(linear.weight.shape)}, needs {list(shape)}"
            )
    unknown = sorted(set(layer.state_dict()) - described)
    if unknown:
        raise ValueError(f"model: {name} has {unknown[0]}, which {arch.model_type} layers have not")
    try:  # an empty layer of ours knows what it can hold
        hf.new_layer(layer, arch, geometry, config, index, torch.float32, "meta", "kernel")
    except ValueError as error:
        raise ValueError(f"model: {name}.{error}") from error


def _check_tensors(model: nn.Module) -> None:
    dtypes = {}
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"model: {name} is on the meta device; load its weights first")
        dtypes[parameter.dtype] = name
        if parameter.dtype not in DTYPES or len(dtypes) > 1:
            got = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
            raise ValueError(f"model: got {got}, needs one dtype of {', '.join(map(str, DTYPES))}")
    for name, parameter in model.named_parameters():
        # A sum is finite only if every term is; float64 keeps large ones from overflowing.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float64)):
            raise ValueError(f"model: {name} holds values that are not finite")


def _log_unrotated(config: QuarotConfig, geometry: Geometry) -> None:
    sizes = {
        "hidden size (R1)": (
            config.r1 and config.rotation == "hadamard",
            geometry.hidden,
        ),
        "head dimension (R2, R3)": (config.r2 or config.r3, geometry.head_dim),
        "intermediate size (R4)": (config.r4, geometry.intermediate),
        "heads (head Hadamard)": (config.head_hadamard, geometry.heads),
    }
    for name, (used, n) in sizes.items():
        size = hadamard.split(n)[0]
        if used and size == 1 < n:
            logger.warning("%s: %d has no Hadamard matrix, left unrotated", name, n)
        elif used and size < n:
            logger.info("%s: %d is rotated in blocks of %d", name, n, size)


# --- after it -----------------------------------------------------------------------------------


def _own_config(model: Any) -> None:
    """Give a model a copy of its config: the caller may build other models of that one."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _forget_quantizer(model: Any) -> None:
    """Make a model that was dequantized on load (GGUF) an ordinary one."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _make_unusable(model: Any, decoder: Any, error: BaseException) -> None:
    """Turn a half-converted model into one whose every use raises, with the reason.

    So for the decoder in it, which can be used by itself.
    """
    reason = (
        "this model is unusable: quarot.convert failed half-way "
        f"({type(error).__name__}: {error}); load it again"
    )
    for module in (model, decoder):
        swap_class(module, _unusable, reason)


def _unusable(kind: type, reason: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(reason)

    uses = ("__call__", "forward", "generate", "state_dict", "save_pretrained", "push_to_hub")
    body = {**dict.fromkeys(uses, refuse), "_quarot_unusable": reason}
    return type(kind.__name__, (kind,), body)
