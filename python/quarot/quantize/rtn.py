"""Round-to-nearest quantization of weights with clip search: needs no data."""

from __future__ import annotations

from torch import Tensor

from quarot.config import QuarotConfig
from quarot.quantize import grid


def quantize_weight(w: Tensor, config: QuarotConfig) -> tuple[Tensor, Tensor]:
    """Quantize the weight of a linear as `config` says (w_group, w_clip_search, w_clip_norm).

    Args:
        w: float [out, in], rotated and with the norm before it folded in; in is even.
        config: a config with w_bits = 4.

    Returns:
        Packed codes uint8 [out, in/2] and scale float32 [out, groups]; one group without w_group.
        QuaRot (arXiv 2404.00456), section 5.

    Raises:
        ValueError: non-finite weights, or a group that does not divide the columns.
    """
    scale = grid.weight_scales(
        w, config.w_bits, config.w_group, config.w_clip_search, config.w_clip_norm
    )
    return grid.pack(grid.codes(w, scale)), scale
