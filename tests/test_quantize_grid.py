"""quantize.grid: the clip search against brute force in float64, codes, packing, memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from quarot import ops
from quarot.quantize import grid


def brute_force(w, group, norm, weights=None):
    """Error of every shrink factor in float64, [80, out, groups], and max|w| [out, groups]."""
    rows = w.double().unflatten(-1, (-1, group or w.shape[1]))
    amax = rows.abs().amax(-1)
    errors = []
    for percent in range(100, 20, -1):
        scale = (percent / 100 * amax / 7)[..., None]
        error = ((rows / scale).round().clamp(-8, 7) * scale - rows).abs() ** norm
        if weights is not None:
            error = error * weights.double().unflatten(-1, (-1, group or w.shape[1]))
        errors.append(error.sum(-1))
    return torch.stack(errors), amax


def assert_first_minimum(w, scale, group, norm, weights=None):
    errors, amax = brute_force(w, group, norm, weights)
    shrink = scale.double() * 7 / amax
    trial = (100 - 100 * shrink).round().long()
    assert trial.min() >= 0 and trial.max() < 80
    torch.testing.assert_close(shrink, 1 - trial / 100, rtol=1e-6, atol=0, check_dtype=False)
    chosen = errors.gather(0, trial[None])[0]
    assert (chosen <= errors.amin(0) * (1 + 1e-5)).all()
    earlier = torch.arange(80)[:, None, None] < trial
    assert not (earlier & (errors < chosen * (1 - 1e-5))).any()


@pytest.mark.parametrize("norm", [2.4, 2.0, 3.0, 1.5])
@pytest.mark.parametrize("group", [0, 32, 96])
@pytest.mark.parametrize("weighted", [False, True])
def test_clip_search_finds_the_first_minimum(norm, group, weighted):
    w = torch.randn(12, 192) * torch.logspace(-4, 4, 12)[:, None]
    w[3] = w[3] ** 3  # heavy tails
    weights = torch.rand(192) if weighted else None
    scale = grid.weight_scales(w, 4, group, norm=norm, weights=weights)
    assert scale.shape == (12, 192 // group if group else 1)
    assert_first_minimum(w, scale, group, norm, weights)


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    width=st.integers(1, 40),
    norm=st.sampled_from([2.0, 2.4]),
    tail=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_clip_search_on_any_shape(rows, groups, width, norm, tail, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * width, generator=generator) ** tail + 1e-3
    scale = grid.weight_scales(w, 4, width, norm=norm)
    assert_first_minimum(w, scale, width, norm)


def test_search_does_not_depend_on_the_blocks(monkeypatch):
    w = torch.randn(40, 64)
    whole = grid.weight_scales(w, 4, 32)
    monkeypatch.setitem(grid._BLOCK, "cpu", 15 * 64)  # blocks of 15, 15 and 10 rows
    assert torch.equal(grid.weight_scales(w, 4, 32), whole)


def test_weights_move_the_optimum_to_what_matters():
    w = torch.randn(1, 64)
    w[0, 0] = 10
    outlier, rest = torch.zeros(64), torch.ones(64)
    outlier[0], rest[0] = 1, 0
    assert grid.weight_scales(w, weights=outlier) == 10 / torch.tensor(7.0)
    assert grid.weight_scales(w, weights=rest) < 5 / torch.tensor(7.0)


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


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("group", [0, 32])
def test_memory_is_bounded_by_a_block(group, monkeypatch):
    monkeypatch.setitem(grid._BLOCK, "cpu", 1 << 12)
    w = torch.randn(64, 128).half()
    with LargestTensor() as largest:
        grid.weight_scales(w, 4, group)
    # Eighty errors a group are the largest table: 80 / 32 of a block.
    assert (1 << 12) <= largest.numel <= 80 * (1 << 12) // 32


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
        (torch.zeros(4, 64), {"weights": torch.ones(32)}, r"^weights: got \[32\].*\[64\]"),
    ],
)
def test_refusals_name_the_argument(w, options, message):
    with pytest.raises(ValueError, match=message):
        grid.weight_scales(w, **options)
