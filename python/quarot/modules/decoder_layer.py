"""The decoder layer of a converted model: one implementation for every architecture.

Ten op calls: norm and quantize, q|k|v, RoPE + R3 + append to the quantized
cache, attention to it, head Hadamard and quantize, output projection + residual; norm and quantize,
gate|up, activation + R4 + quantize, down projection + residual.

In a state dict the layer looks like the one it replaces (module `canonical`). Those tensors exist
while a checkpoint is read. `fuse` moves them into the kernels' buffers, and saving or loading
translates, so there is never more than one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from quarot import hadamard
from quarot.cache import CacheSpec, QuantizedLayer, adopt
from quarot.config import QuarotConfig
from quarot.models.base import Architecture, Geometry
from quarot.modules import attention, canonical, replay
from quarot.modules import mask as masks
from quarot.modules.canonical import CanonicalLinear
from quarot.modules.linear import QuantizedLinear, backend_ops
from quarot.modules.watched import Watched


class DecoderLayer(Watched):
    """Run one decoder layer on quantized weights, activations and cache.

    Args:
        architecture, geometry: what the layer looks like and its sizes.
        config: bits, clips and which online transforms to run.
        index: of this layer in the model (and in the cache).
        biases: paths of the linears that have a bias.
        dtype: of norms, biases, 16-bit weights: bfloat16, float16 or float32.
        device: "meta" makes an empty layer to load a checkpoint into.
        backend: "kernel" or "reference"; decides the layout of the fused weights.

    Raises:
        ValueError: a linear's width does not suit 4-bit weights or their group, or head_dim the
            quantized cache.
    """

    gradient_checkpointing = False  # transformers sets it on modules that have it; unused here

    def __init__(
        self,
        architecture: Architecture,
        geometry: Geometry,
        config: QuarotConfig,
        index: int,
        *,
        biases: Iterable[str] = (),
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        backend: str = "kernel",
    ) -> None:
        super().__init__()
        backend_ops(backend)  # raises on an unknown one
        self.architecture, self.geometry, self.config = architecture, geometry, config
        self.index, self.backend = index, backend
        self.cache_spec = CacheSpec(config.kv_bits, geometry.kv_heads, geometry.head_dim)
        # Sizes of the online transforms, 1 = none; `rotate` fuses exactly the inverses.
        self.r3_size = hadamard.split(geometry.head_dim)[0] if config.r3 else 1
        self.r4_size = hadamard.split(geometry.intermediate)[0] if config.r4 else 1
        self.head_block = hadamard.split(geometry.heads)[0] if config.head_hadamard else 1
        self.fused = self._fuse_after_load = False

        canonical.build(
            self, architecture, geometry, config, biases=biases, dtype=dtype, device=device
        )
        a = architecture
        self._linears = {
            "qkv": (a.q, a.k, a.v),
            "o": (a.o,),
            "gate_up": (a.gate, a.up),
            "down": (a.down,),
        }
        self.kernels = nn.ModuleDict(
            {
                name: QuantizedLinear(
                    self._parts(name),
                    bits=config.w_bits,
                    zero_points=not config.a_symmetric and config.a_bits < 16,
                    backend=backend,
                )
                for name in self._linears
            }
        )
        # A token's step is ten op calls of some microseconds: what they need and never changes is
        # looked up once. Modules in a plain dict are not registered a second time.
        self._norms = {
            name: cast(canonical.NormWeight, self.get_submodule(path))
            for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")
            if (path := getattr(a, name)) is not None
        }
        self._fused_linears = dict(self.kernels.items())
        self._codes = {site: self._quantizer(site) for site in ("qkv", "o", "up_gate", "down")}
        self._append_options = {
            "bits": config.kv_bits,
            "size": self.r3_size,
            "k_clip": config.clip("k", index),
            "v_clip": config.clip("v", index),
        }
        self.register_load_state_dict_post_hook(_fuse_again)

    # --- weights --------------------------------------------------------------------------------

    def fuse(self) -> None:
        """Move the canonical weights into the kernels' buffers; nothing to do the second time.

        Raises:
            RuntimeError: the weights are on the meta device: nothing was loaded yet.
        """
        if self.fused:
            return
        for name in self._linears:
            if any(t.is_meta for part in self._parts(name) for t in part.buffers()):
                raise RuntimeError(
                    f"weights: layer {self.index} is on the meta device; load it first"
                )
        for name in self._linears:
            self._kernel(name).fuse(self._parts(name))
        self.fused = True

    def unfuse(self) -> None:
        """Move the weights back to their canonical names, for reading or loading them."""
        if not self.fused:
            return
        for name in self._linears:
            self._kernel(name).unfuse(self._parts(name))
        self.fused = False

    def _parts(self, name: str) -> list[CanonicalLinear]:
        parts = []
        for path in self._linears[name]:
            part = self.get_submodule(path)
            assert isinstance(part, CanonicalLinear)  # the tree lets nothing else in its place
            parts.append(part)
        return parts

    def _kernel(self, name: str) -> QuantizedLinear:
        kernel = self.kernels[name]
        assert isinstance(kernel, QuantizedLinear)
        return kernel

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fused:  # else the canonical linears write themselves
            for name, paths in self._linears.items():
                for path, tensors in zip(paths, self._kernel(name).canonical(), strict=True):
                    for tensor_name, tensor in tensors.items():
                        destination[f"{prefix}{path}.{tensor_name}"] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Runs before the children load: they then receive canonical tensors by name.
        self._fuse_after_load = self.fused
        self.unfuse()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DecoderLayer:
        canonical.check_dtype(fn, next(self.parameters()).device)
        super()._apply(fn, recurse)
        return self

    # --- computing ------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output [batch, tokens, hidden], as transformers' model calls it.

        Args:
            hidden_states: [batch, tokens, hidden].
            attention_mask: None, [batch, keys], or bool or float [batch, 1 or heads, queries, keys]
                (module `mask`). One without a row a query only hides keys from causal attention.
            past_key_values: a transformers Cache whose layer is empty or ours, or None.
            position_embeddings: (cos, sin), each [batch or 1, tokens, rotary_dim].
            position_ids, use_cache: in the signature for transformers; not needed.

        Raises:
            RuntimeError: the weights are not fused.
            ValueError: attention weights are asked for (no kernel stores them), or another
                argument is of the wrong kind.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: got True; the attention kernel keeps no weights")
        if not self.fused:
            raise RuntimeError(f"weights: layer {self.index} is not fused; call fuse() first")
        if position_embeddings is None:
            raise ValueError("position_embeddings: got None, needs (cos, sin)")
        if hidden_states.shape[1] == 1 and attention_mask is None:
            output = replay.step(
                self,
                lambda x, angles: self._compute(x, None, past_key_values, angles),
                hidden_states,
                past_key_values,
                position_embeddings,
            )
            if output is not None:
                return output
        return self._compute(hidden_states, attention_mask, past_key_values, position_embeddings)

    def _compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Do what `forward` says, op by op."""
        ops, geometry, dtype = backend_ops(self.backend), self.geometry, hidden_states.dtype
        linears, codes, eps = self._fused_linears, self._codes, geometry.norm_eps

        x = ops.rmsnorm_quantize(hidden_states, self._norm("attention_norm"), eps, **codes["qkv"])
        qkv = linears["qkv"](*x, out_dtype=dtype)
        heads = qkv.unflatten(-1, (-1, geometry.head_dim))
        sizes = [geometry.heads, geometry.kv_heads, geometry.kv_heads]
        q, k, v = torch.split_with_sizes(heads, sizes, 2)
        if "q_norm" in self._norms:
            q = ops.rmsnorm_quantize(q, self._norm("q_norm"), eps, bits=16)[0]
        if "k_norm" in self._norms:
            k = ops.rmsnorm_quantize(k, self._norm("k_norm"), eps, bits=16)[0]
        mixed = self._attend(q, k, v, position_embeddings, attention_mask, past_key_values)
        x = ops.head_hadamard_quantize(mixed, self.head_block, **codes["o"])
        hidden_states = linears["o"](*x, hidden_states, out_dtype=dtype)

        x = ops.rmsnorm_quantize(hidden_states, self._norm("mlp_norm"), eps, **codes["up_gate"])
        gate_up = linears["gate_up"](*x, out_dtype=dtype)
        x = ops.glu_hadamard_quantize(gate_up, geometry.activation, self.r4_size, **codes["down"])
        return linears["down"](*x, hidden_states, out_dtype=dtype)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
    ) -> Tensor:
        """Return attention [batch, tokens, heads, head_dim] of q, k, v [batch, tokens, …]."""
        mask = masks.check_mask(attention_mask)
        scale = self.geometry.head_dim**-0.5
        cos, sin = position_embeddings
        if self.config.kv_bits == 16:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            q, k = attention.rope(q, cos, sin), attention.rope(k, cos, sin)
            offset: int | Tensor = 0
            if past_key_values is not None:
                offset = past_key_values.get_seq_length(self.index)
                if isinstance(offset, Tensor):  # a static layer's own counter: update() moves it
                    offset = offset.clone()
                k, v = past_key_values.update(k, v, self.index)
            return attention.attend(q, k, v, mask, scale, offset).transpose(1, 2)

        batch, tokens = q.shape[:2]
        if past_key_values is None:  # every query attends to quantized keys, cached or not
            cache = QuantizedLayer(self.cache_spec, max_cache_len=tokens)
        else:
            cache = adopt(past_key_values, self.index, self.cache_spec)
        start, lengths = cache.reserve(batch, tokens, q.device)
        ops = backend_ops(self.backend)
        buffers = cache.buffers
        q = ops.rope_hadamard_kv_append(q, k, v, cos, sin, *buffers, start, **self._append_options)
        cache.advance(tokens)
        if not attention.is_padding(mask, tokens):
            keys, values = cache.dequantize(q.dtype)
            return attention.attend(q.transpose(1, 2), keys, values, mask, scale).transpose(1, 2)
        if mask is not None:
            mask = masks.kernel_mask(mask, batch, tokens, cache.length, cache.capacity)
        return ops.attention(
            q,
            *buffers,
            lengths,
            mask,
            bits=self.config.kv_bits,
            scale=scale,
            length=cache.known_length,
        )

    def _norm(self, name: str) -> Tensor:
        weight = self._norms[name].weight
        assert isinstance(weight, Tensor)
        return weight

    def _quantizer(self, site: str) -> dict[str, Any]:
        """How the activations at `site` are quantized, as the ops' keyword arguments."""
        config = self.config
        return {
            "bits": config.a_bits,
            "symmetric": config.a_symmetric,
            "clip": config.clip(site, self.index),
        }


def _fuse_again(layer: nn.Module, incompatible_keys: Any) -> None:
    """Undo the unfusing of `_load_from_state_dict`, once the children are loaded."""
    assert isinstance(layer, DecoderLayer)
    if layer._fuse_after_load:
        layer.fuse()
