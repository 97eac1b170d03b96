"""Attention masks: what transformers is told to build, and what a decoder layer makes of it.

Importing this module registers the name "quarot" with transformers as an attention implementation
(`config._attn_implementation`). Its masks leave causality to the kernel: None when nothing is
padded, else bool [batch, 1, 1, keys], True where a key may be seen. Under a name transformers does
not know, padding would be ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

NAME = "quarot"
"""Name of the attention implementation in transformers' registries."""


def quarot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Build a mask as transformers' registry calls for it.

    Args:
        attention_mask: bool [batch, tokens seen so far], False = padding.
        mask_function: anything but the causal one (packed sequences …) is written out by
            transformers' `sdpa_mask`: bool [batch, 1, q_length, kv_length].

    Returns:
        None: plain causal attention; or bool [batch, 1, 1, kv_length]: causal attention to the
        keys that are True.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        _refuse_mask(attention_mask)  # transformers hands only 4-D ones on as they are
    plain = mask_function is causal_mask_function and kv_offset == 0
    if not plain or isinstance(q_offset, Tensor):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None:
        return None
    seen = q_offset + q_length
    keep = padding_mask(attention_mask, kv_length)
    if not torch.compiler.is_compiling() and bool(keep[..., :seen].all()):
        return None
    return keep


def padding_mask(mask: Tensor, keys: int) -> Tensor:
    """Turn a 2-D mask [batch, tokens], non-zero = keep, into bool [batch, 1, 1, keys].

    Keys beyond the mask are not seen: the free places of a static cache.
    """
    keep = mask[:, :keys].to(torch.bool)
    keep = functional.pad(keep, (0, keys - keep.shape[1]))
    return keep[:, None, None]


def kernel_mask(mask: Tensor, batch: int, tokens: int, length: int, capacity: int) -> Tensor:
    """Return a padding mask as the kernel reads it: bool [batch, 1 or heads, tokens, keys].

    Args:
        mask: [1 or batch, keys], or bool [1 or batch, 1 or heads, 1, keys].
        length, capacity: tokens in the cache, and its room: length <= keys; more than the room is
            cut off (a prefix-tuning mask without a cache).

    Raises:
        ValueError: there are fewer keys than tokens in the cache.
    """
    if mask.shape[-1] < length:
        raise ValueError(
            f"attention_mask: covers {mask.shape[-1]} keys, needs all {length} seen so far"
        )
    keep = padding_mask(mask, length) if mask.ndim == 2 else mask[..., :capacity]
    return keep.expand(batch, -1, tokens, -1)


def check_mask(mask: Any) -> Tensor | None:
    """Return a decoder layer's `attention_mask` argument if it is of a kind we can apply.

    Raises:
        TypeError: not a tensor (flex attention's BlockMask).
        ValueError: a tensor of another rank, or 4-D of another dtype than bool or float.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask: got {type(mask).__name__}, needs None or a tensor: [batch, keys], or "
            "bool or float [batch, 1 or heads, queries, keys]"
        )
    four = mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
    if mask.ndim != 2 and not four:
        _refuse_mask(mask)
    return mask


def _refuse_mask(mask: Tensor) -> NoReturn:
    raise ValueError(
        f"attention_mask: got {mask.dtype} of shape {tuple(mask.shape)}, needs [batch, keys], "
        "or bool or float [batch, 1 or heads, queries, keys]"
    )


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f'attn_implementation: "{NAME}" runs only inside quarot\'s decoder layers; an unconverted '
        'model needs another one, such as "sdpa"'
    )


AttentionMaskInterface.register(NAME, quarot_mask)
AttentionInterface.register(NAME, _refuse)
