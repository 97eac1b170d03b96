"""What quarot must know of an architecture, as data.

`rotate`, `modules` and `convert` read only these two descriptions: a family that fits them is one
file with one `Architecture`, and one line in the registry. Paths are dotted attribute names, the
ones `state_dict` uses; those under "layer" are relative to a decoder layer.

The layers described are pre-norm: x += o(attention(q, k, v of norm(x))); x += down(act(gate) * up
of norm(x)), with RMSNorm, rotary positions and bias-free or biased linears.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Where the parts of a decoder-only model are.

    Args:
        model_type: transformers' `config.model_type`.
        decoder: the module whose `layers` run one after the other ("model").
        embedding, layers, final_norm, head, rotary: paths in the causal LM.
        attention_norm: norm that feeds `q`, `k` and `v`;  mlp_norm: norm that feeds `gate`, `up`.
        q, k, v, o, gate, up, down: linears of a layer; `o` and `down` write the residual stream.
        q_norm, k_norm: per-head norms before RoPE, or None.
    """

    model_type: str
    decoder: str = "model"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    q_norm: str | None = None
    k_norm: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of a layer's linears, in execution order."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    @property
    def norm_readers(self) -> dict[str, tuple[str, ...]]:
        """Each norm of a layer -> the linears that read its output."""
        return {self.attention_norm: (self.q, self.k, self.v), self.mlp_norm: (self.gate, self.up)}

    @property
    def residual_writers(self) -> tuple[str, ...]:
        """Linears whose output is added to the residual stream."""
        return (self.o, self.down)

    def geometry(self, config: Any) -> Geometry:
        """Read the sizes from a transformers config; raise ValueError on what is not supported."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads: got {kv_heads}, needs a divisor of {heads} heads"
            )
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if layer_types != {"full_attention"}:
            raise ValueError(f"layer_types: got {sorted(layer_types)}, needs full_attention only")
        return Geometry(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            activation=_activation(config.hidden_act),
            norm_eps=config.rms_norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a model: everything a layer's shapes follow from.

    Args:
        layers: number of decoder layers;  hidden: width of the residual stream.
        intermediate: width of the MLP;  heads, kv_heads, head_dim: attention geometry (GQA).
        activation: "silu", "gelu" (exact) or "gelu_tanh";  norm_eps: epsilon of the RMSNorms.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float


def _activation(name: str) -> str:
    known = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise ValueError(f"hidden_act: got {name!r}, needs one of {', '.join(known)}")
    return known[name]
