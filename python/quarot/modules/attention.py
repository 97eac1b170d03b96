"""Attention on 16-bit keys and values through torch's SDPA.

Used where the kernels' causal attention to the quantized cache does not apply: a 16-bit KV cache,
and masks that write out every query's keys. Shapes here are [batch, heads, tokens, head_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quarot.modules.mask import padding_mask
from quarot.ops import reference


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R entries: x [B, H, S, D], cos and sin [B or 1, S, R].

    Computed in float32, rounded once to x's dtype.
    """
    return reference.rope(x, cos.unsqueeze(1), sin.unsqueeze(1)).to(x.dtype)


def is_padding(mask: Tensor | None, queries: int) -> bool:
    """Tell a mask that only says which keys are padding from one that lists each query's keys."""
    if mask is None or mask.ndim == 2:
        return True
    return mask.dtype == torch.bool and (mask.shape[2] == 1 or queries == 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, offset: int | Tensor = 0
) -> Tensor:
    """Return softmax(q k^T scale + mask) v: [B, H, S, D]; a query that sees no key gets 0.

    Args:
        q: [B, H, S, D];  k, v: [B, H_kv, L, D], H_kv divides H.
        mask: None, or one that `is_padding`: then attention is causal, query s being token
            offset + s; else bool (True = see) or float (added), [B, 1 or H, S, at least L].
    """
    queries, keys = q.shape[2], k.shape[2]
    whole = isinstance(offset, int) and offset + queries == keys
    if mask is None and whole and (offset == 0 or queries == 1):
        # With both a past and several queries torch's is_causal would align the wrong corner.
        return _sdpa(q, k, v, None, scale, is_causal=queries > 1)
    if mask is None or is_padding(mask, queries):
        visible = causal(queries, keys, offset, q.device)
        if mask is not None:
            visible = visible & (padding_mask(mask, keys) if mask.ndim == 2 else mask[..., :keys])
        mask = visible
    if mask.shape[-1] < keys:
        raise ValueError(
            f"attention_mask: covers {mask.shape[-1]} keys, needs all {keys} seen so far"
        )
    mask = mask[..., :keys]
    out = _sdpa(q, k, v, mask, scale, is_causal=False)
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return out.masked_fill(~seen.any(-1, keepdim=True), 0)


def causal(queries: int, keys: int, offset: int | Tensor, device: torch.device) -> Tensor:
    """Return bool [queries, keys]: query s, which is token offset + s, sees keys up to itself."""
    token = torch.arange(queries, device=device) + offset
    return torch.arange(keys, device=device) <= token[:, None]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
