"""Decode on CUDA by graph replay, behind the model's own `forward`.

A decode step of an 8B model is some 400 kernels of a few microseconds, which Python cannot launch
as fast as a GPU runs them. So the first step of a kind (batch, masked or not) runs as ever; then a
step is captured as a CUDA graph, and each further token is one replay: copy ids, positions and mask
into the graph's inputs, count the lengths up on the device, launch.

A graph reads and writes fixed addresses. Those of the cache belong to its key; where a cache grows
or another one comes, a step is captured anew, unless the addresses are those of one of the last
graphs (`generate` after `generate`, mostly). Weights that moved drop all graphs of the model.

Whatever is not a plain step runs eagerly: several queries, hooks on modules inside, embeddings as
input, outputs other than logits, autocast, training, KV16 caches, head sizes that attention has no
kernel for, several devices, the reference backend; everything with `model.quarot_graph = False`.

Over 300 lines: what a graph relies on, and when it may not run, is meant to stand in one file.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from quarot.cache import QuantizedLayer
from quarot.generate import generate as loop
from quarot.models import describe
from quarot.modules import watched
from quarot.modules.decoder_layer import DecoderLayer
from quarot.modules.swapped import swap_class

MOST_GRAPHS = 8
"""Graphs kept of a model; the one not used for longest goes. They share their memory."""

_HEAD_DIMS = (64, 96, 128, 256)
"""What attention has a kernel for (kernels/cuda/attention.cu); else it would write out, every step,
all keys that the cache has room for."""
_INERT_HOOKS = "transformers.utils.output_capturing"

logger = logging.getLogger("quarot")

Forward = Callable[..., Any]

# Not on the models: those are copied and saved, graphs cannot be.
_recorders: weakref.WeakKeyDictionary[Any, _Recorder] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # inputs, outputs and memory of graphs are one step's at a time


class GraphedModel:
    """What is mixed into the class of a converted model.

    quarot_graph: whether decode on CUDA may replay graphs.
    """

    quarot_graph: bool = True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, which hands a custom loop neither of these arguments."""
        if kwargs.get("custom_generate") is loop:
            if kwargs.get("assistant_model") is not None:
                raise ValueError(
                    "assistant_model: quarot.generate cannot be assisted; leave custom_generate out"
                )
            streamer = kwargs.pop("streamer", None)
            kwargs["custom_generate"] = functools.partial(loop, streamer=streamer)
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def install(model: Any) -> None:
    """Make the `forward` of a converted causal LM replay graphs."""
    if not isinstance(model, GraphedModel):
        swap_class(model, _graphed)


def _graphed(kind: type) -> type:
    eager: Forward = kind.forward  # type: ignore[attr-defined]

    @functools.wraps(eager)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = _step(self, functools.partial(eager, self), args, kwargs)
        return eager(self, *args, **kwargs) if output is None else output

    return type(kind.__name__, (GraphedModel, kind), {"forward": forward})


def _step(
    model: Any, eager: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CausalLMOutputWithPast | None:
    """Run a decode step by a graph, or return None: to be run eagerly."""
    ids = args[0] if args else kwargs.get("input_ids")
    cache = kwargs.get("past_key_values")
    if len(args) > 1 or not isinstance(ids, Tensor) or not ids.is_cuda or ids.ndim != 2:
        return None
    if ids.shape[1] != 1 or not isinstance(cache, Cache) or torch.compiler.is_compiling():
        return None
    if not model.quarot_graph:
        _recorders.pop(model, None)
        return None
    with _lock:
        recorder = _recorders.get(model)
        if recorder is None or recorder.outdated(model):
            recorder = _recorders[model] = _Recorder(model)
        return recorder.step(eager, ids, cache, kwargs)


_PLAIN = {"use_cache": True, "return_dict": True, "logits_to_keep": 1}
"""Arguments of a plain step, beside its inputs, that a graph takes into account."""
_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Tell whether a step asks for logits and nothing else."""
    for name, value in kwargs.items():
        if name in _INPUTS or value is None or value is False:
            continue
        plain = name in _PLAIN and isinstance(value, int) and value in (_PLAIN[name], 0)
        if not plain:
            return False
    return kwargs.get("use_cache") is not False and kwargs.get("return_dict") is not False


class _Recorder:
    """The graphs of one model, and what they rely on.

    Holds no reference to the model itself, which could then never be freed.
    """

    def __init__(self, model: Any) -> None:
        arch = describe(model.config)
        decoder, layers = model.get_submodule(arch.decoder), model.get_submodule(arch.layers)
        others = [
            model.get_submodule(path)
            for path in (arch.embedding, arch.final_norm, arch.head, arch.rotary)
        ]
        run = [decoder, *others]
        for layer in layers:
            run += [layer, *getattr(layer, "kernels", nn.ModuleDict()).values()]
        self.hooks = [
            hooks for module in run for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.hooks += [
            nn.modules.module._global_forward_hooks,
            nn.modules.module._global_forward_pre_hooks,
        ]
        self.moves = watched.moves()
        self.layers: dict[str, Any] = layers._modules
        self.known_layers = list(self.layers.values())
        paths = (arch.decoder, arch.layers, arch.embedding, arch.final_norm, arch.head, arch.rotary)
        self.places = [_place(model, path) for path in paths]
        self.attributes = [vars(module) for module in (decoder, *others)]
        self.patched = self._is_patched()
        self.holders = [h for m in others for h in (m._parameters, m._buffers) if h]
        self.addresses = self._addresses()
        self.config = model.config
        self.settings = vars(model.config)  # much faster to read than its attributes
        self.graphs: collections.OrderedDict[tuple[Any, ...], _Graph] = collections.OrderedDict()
        self.last: _Graph | None = None
        self.warm: set[tuple[int, bool]] = set()
        self.pool: Any = None
        self.device = model.device
        self.stream: Any = None
        self.usable = self._is_usable(model, run, model.get_submodule(arch.rotary))

    def _others(self) -> Iterator[Tensor]:
        """Yield the weights outside of the layers."""
        return (t for held in self.holders for t in held.values() if t is not None)

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._others()]

    def _is_usable(self, model: Any, run: list[nn.Module], rotary: nn.Module) -> bool:
        # These look at the positions on the host.
        if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
            return False
        devices = {t.device for t in (*model.parameters(), *model.buffers())}
        ours = all(
            isinstance(layer, DecoderLayer)
            and layer.backend == "kernel"
            and layer.geometry.head_dim in _HEAD_DIMS
            for layer in self.known_layers
        )
        patched = any("forward" in vars(module) for module in run)  # accelerate's hooks
        return ours and not patched and len(devices) == 1

    def _is_patched(self) -> bool:
        """Tell whether a module outside of the layers has a forward of its own."""
        return any("forward" in attributes for attributes in self.attributes)

    def outdated(self, model: Any) -> bool:
        """Tell whether weights moved, or modules, the config or a forward became others.

        Asked each token, so inside of the layers such changes are counted where they happen.
        """
        return (
            self.moves != watched.moves()
            or model.config is not self.config
            or any(modules.get(name) is not module for modules, name, module in self.places)
            or list(self.layers.values()) != self.known_layers
            or self._addresses() != self.addresses
            or self._is_patched() != self.patched
        )

    def step(
        self, eager: Forward, ids: Tensor, cache: Cache, kwargs: dict[str, Any]
    ) -> CausalLMOutputWithPast | None:
        """Append a token by a graph, captured if need be; or return None: to be run eagerly."""
        if not self.usable or not self._may_replay(ids, kwargs):
            return None
        layers, graph = cache.layers, self.last
        known = graph is not None and graph.is_of(layers)
        length = layers[0].length if known else _common_length(layers, len(self.known_layers))
        if not length:
            return None
        positions = kwargs.get("position_ids")
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != 1):
            return None
        mask = kwargs.get("attention_mask")
        if mask is not None and not _is_padding(mask, ids.shape[0], length + 1):
            return None
        if mask is not None and mask.ndim == 2 and bool(mask.all()):
            mask = None
        kind = (ids.shape[0], mask is not None)
        if graph is None or not known or graph.kind != kind or length >= graph.capacity:
            if kind not in self.warm:  # loads kernels and constants, which a capture may not
                self.warm.add(kind)
                return None
            graph = self.last = self._graph(eager, kind, cache, length, ids.device)
            if graph is None:
                return None
        stream = torch.cuda.current_stream(self.device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
        self.stream = stream
        logits = graph.run(ids, mask, positions, layers, length)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _is_hooked(self) -> bool:
        """Tell whether somebody wants to see what the modules inside do."""
        # transformers leaves its hooks for output_hidden_states, which do nothing unless asked.
        return any(self.hooks) and any(
            getattr(hook, "__module__", "") != _INERT_HOOKS
            for hooks in self.hooks
            for hook in hooks.values()
        )

    def _may_replay(self, ids: Tensor, kwargs: dict[str, Any]) -> bool:
        settings = self.settings
        return (
            _is_plain(kwargs)
            and type(ids) is Tensor
            and ids.device == self.device
            and not self._is_hooked()
            and settings["use_cache"]
            and settings["return_dict"]
            and not (settings["output_hidden_states"] or settings["_output_attentions"])
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in self._others()))
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
        )

    def _graph(
        self,
        eager: Forward,
        kind: tuple[int, bool],
        cache: Cache,
        length: int,
        device: torch.device,
    ) -> _Graph | None:
        """Return the graph for a cache: a known one, a new one, or None if none can be captured."""
        batch = kind[0]
        for layer in cache.layers:
            start, _ = layer.reserve(batch, 1, device)  # may grow
        key = (
            kind,
            start.data_ptr(),
            *((layer.capacity, *(b.data_ptr() for b in layer.buffers)) for layer in cache.layers),
        )
        graph = self.graphs.get(key)
        if graph is not None:
            self.graphs.move_to_end(key)
            graph.stamps = [layer.stamp for layer in cache.layers]
            return graph
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()
        while len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)
        self.last = None
        try:
            graph = _Graph(eager, kind, cache, length, device, self.pool)
        except RuntimeError as error:  # torch's errors of CUDA and of memory are among them
            logger.warning(
                "no CUDA graph: capturing a decode step failed, decode goes on without (%s: %s)",
                type(error).__name__,
                str(error).splitlines()[0] if str(error) else "",
            )
            self.graphs.clear()
            self.usable = False
            return None
        self.graphs[key] = graph
        return graph


class _Graph:
    """One captured decode step of a cache, and its inputs and outputs."""

    def __init__(
        self,
        eager: Forward,
        kind: tuple[int, bool],
        cache: Cache,
        length: int,
        device: torch.device,
        pool: Any,
    ) -> None:
        batch, masked = kind
        self.kind, self.stamps = kind, [layer.stamp for layer in cache.layers]
        self.capacity = min(layer.capacity for layer in cache.layers)
        with torch.inference_mode(False):
            self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.positions = torch.zeros_like(self.ids)
            self.mask = (
                torch.zeros(batch, 1, 1, self.capacity, dtype=torch.bool, device=device)
                if masked
                else None
            )
        self.graph = torch.cuda.CUDAGraph()
        with _recording(self.graph, cache.layers, length, device, pool):
            self.logits = eager(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=1,
            ).logits

    def is_of(self, layers: list[Any]) -> bool:
        """Tell whether this graph's cache has these layers, and they are of one length."""
        if len(layers) != len(self.stamps):
            return False
        length = getattr(layers[0], "length", None)
        for layer, stamp in zip(layers, self.stamps, strict=True):
            if getattr(layer, "stamp", None) is not stamp or layer.length != length:
                return False
        return True

    def run(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, layers: Any, length: int
    ) -> Tensor:
        """Append a token: return its logits [batch, 1, vocabulary]."""
        self.ids.copy_(ids)
        if positions is None:
            self.positions.fill_(length)
        else:
            self.positions.copy_(positions)
        if self.mask is not None:
            assert mask is not None
            seen = mask[:, None, None] if mask.ndim == 2 else mask
            self.mask[..., : length + 1].copy_(seen[..., : length + 1])
        layers[0].lengths.at(length, length + 1, self.kind[0], self.ids.device)
        self.graph.replay()
        for layer in layers:
            layer.length = length + 1
        return self.logits.clone()


def _place(model: nn.Module, path: str) -> tuple[dict[str, Any], str, Any]:
    """Return (its parent's modules, its name there, the module) of a path."""
    parent, _, name = path.rpartition(".")
    modules = model.get_submodule(parent)._modules
    return modules, name, modules[name]


def _is_padding(mask: Any, batch: int, keys: int) -> bool:
    """Tell a mask that a graph's step can take: one that only says which keys are padding."""
    if not isinstance(mask, Tensor):
        return False
    if mask.ndim == 2:
        return mask.shape[0] == batch and mask.shape[1] >= keys
    return (
        mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[:3] == (batch, 1, 1)
        and mask.shape[3] >= keys
    )


def _common_length(layers: list[Any], count: int) -> int:
    """Return the tokens in a cache of ours, or 0: not ours, empty, or layers that differ."""
    if len(layers) != count or not isinstance(layers[0], QuantizedLayer):
        return 0
    length, lengths = layers[0].length, layers[0].lengths
    for layer in layers:
        same = isinstance(layer, QuantizedLayer) and layer.lengths is lengths
        if not same or layer.length != length:
            return 0
    return length


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _recording(
    graph: torch.cuda.CUDAGraph, layers: list[Any], length: int, device: torch.device, pool: Any
) -> Iterator[None]:
    """Capture what is done inside; the cache is left as it was, whatever happens."""
    lengths = layers[0].lengths
    stream = _capture_stream(device)
    try:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                lengths.recording = True
                # Other threads may go on using the device.
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    graph.capture_end()
    finally:
        lengths.recording = False
        for layer in layers:
            layer.length = length
