"""quantize.rtn: from a weight and a config to packed codes and scales."""

import pytest
import torch

from quarot import ops
from quarot.config import QuarotConfig
from quarot.quantize import grid, rtn


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantizes_as_the_config_says(group, search, dtype):
    w = torch.randn(20, 192).to(dtype)
    config = QuarotConfig(w_group=group, w_clip_search=search, w_clip_norm=2.0)
    packed, scale = rtn.quantize_weight(w, config)
    assert packed.dtype == torch.uint8 and packed.shape == (20, 96)
    assert scale.dtype == torch.float32 and scale.shape == (20, 192 // group if group else 1)
    assert torch.equal(scale, grid.weight_scales(w, 4, group, search, norm=2.0))
    assert torch.equal(ops.unpack_int4(packed), grid.codes(w, scale))


def test_search_lowers_the_error():
    w = torch.randn(16, 576)
    errors = []
    for search in (True, False):
        packed, scale = rtn.quantize_weight(w, QuarotConfig(w_clip_search=search))
        errors.append((ops.dequantize(packed, scale) - w).square().mean())
    assert errors[0] < 0.9 * errors[1]


def test_dequantized_weight_is_what_the_linear_multiplies_by():
    w = torch.randn(24, 128)
    packed, scale = rtn.quantize_weight(w, QuarotConfig(w_group=64))
    eye = 100 * torch.eye(128)
    x_q, x_scale, _ = ops.quantize(eye, 8)
    prepacked = ops.prepack_int4(packed)
    y = ops.linear_int4(x_q, x_scale, None, prepacked, scale, out_dtype=torch.float32)
    torch.testing.assert_close(y, 100 * ops.dequantize(packed, scale).T, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("columns", "fitting"), [(96, "32"), (576, "32, 64"), (160, "32"), (50, "none")]
)
def test_a_group_that_does_not_fit_names_those_that_do(columns, fitting):
    with pytest.raises(ValueError, match=rf"^group: got 128 for {columns} .*\({fitting}\)"):
        rtn.quantize_weight(torch.zeros(4, columns), QuarotConfig(w_group=128))


def test_refuses_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN"):
        rtn.quantize_weight(torch.full((2, 32), torch.nan), QuarotConfig())
