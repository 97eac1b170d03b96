"""quantize.grid: scales with and without the clip search, codes, packing, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarot import ops
from quarot.quantize import grid


def test_weights_move_the_optimum_to_what_matters():
    w = torch.randn(1, 64)
    w[0, 0] = 10
    outlier, rest = torch.zeros(64), torch.ones(64)
    outlier[0], rest[0] = 1, 0
    assert grid.weight_scales(w, importance=outlier) == 10 / torch.tensor(7.0)
    assert grid.weight_scales(w, importance=rest) < 5 / torch.tensor(7.0)


def test_no_search_keeps_the_largest_weight():
    w = torch.randn(9, 96).bfloat16()
    scale = grid.weight_scales(w, 4, 48, clip_search=False)
    expected = ops.quantize(w, 4, group=48)
    assert torch.equal(scale, expected[1])
    assert torch.equal(grid.codes(w, scale), expected[0])


def test_zero_rows_have_scale_one_and_codes_zero():
    w = torch.randn(3, 64)
    w[1] = 0
    w[2, :32] = 0
    for search in (True, False):
        scale = grid.weight_scales(w, 4, 32, clip_search=search)
        assert (scale[1] == 1).all() and scale[2, 0] == 1 and (scale > 0).all()
        assert not grid.codes(w, scale)[1].any()


def test_half_precision_weights_are_searched_in_float32():
    w = torch.randn(4, 64).bfloat16()
    assert torch.equal(grid.weight_scales(w), grid.weight_scales(w.float()))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 100))
def test_codes_pack_and_back(rows, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 2 * pairs, generator=generator)
    scale = grid.weight_scales(w, clip_search=False)
    codes = grid.codes(w, scale)
    assert codes.dtype == torch.int8 and codes.min() >= -8 and codes.max() <= 7
    assert ((codes * scale - w).abs() <= 0.5001 * scale).all()
    packed = grid.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, pairs)
    assert torch.equal(ops.unpack_int4(packed), codes)


def test_codes_take_the_ninth_level():
    """-8 is used where the clip search shrinks the range below the largest weight."""
    w = torch.tensor([[-8.0, 7.0, 3.0, -1.0]])
    codes = grid.codes(w, torch.ones(1, 1))
    assert codes.tolist() == [[-8, 7, 3, -1]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clip_search", [True, False])
def test_refuses_weights_that_are_not_finite(value, clip_search):
    w = torch.randn(4, 64)
    w[2, 7] = value
    with pytest.raises(ValueError, match="^w: got NaN or infinite weights"):
        grid.weight_scales(w, clip_search=clip_search)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.zeros(4, 64), {"bits": 8}, "^bits: got 8"),
        (torch.zeros(64), {}, r"^w: got torch.float32 \[64\]"),
        (torch.zeros(4, 64, dtype=torch.int8), {}, "^w: got torch.int8"),
        (torch.zeros(4, 64), {"group": 48}, "^group: got 48 for 64"),
        (torch.zeros(4, 64), {"group": -1}, "^group: got -1"),
        (torch.zeros(4, 64), {"importance": torch.ones(32)}, r"^importance: got \[32\].*\[64\]"),
    ],
)
def test_refusals_name_the_argument(w, options, message):
    with pytest.raises(ValueError, match=message):
        grid.weight_scales(w, **options)
