"""ops.clip_search: the first minimum by brute force in float64, its edges, torch integration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import poisoned
from quarot import ops
from quarot.ops import reference

both_modules = pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
OP = torch.ops.quarot.clip_search.default


def brute_force(w, group, norm, importance):
    """Errors of the 80 shrink factors, [80, rows, groups], and the largest weights."""
    width = group or w.shape[1]
    rows = w.double().unflatten(-1, (-1, width))
    mass = 1 if importance is None else importance.double().unflatten(-1, (-1, width))
    amax = rows.abs().amax(-1)
    errors = []
    for percent in range(100, 20, -1):
        scale = (percent / 100 * amax / 7)[..., None]
        error = ((rows / scale).round().clamp(-8, 7) * scale - rows).abs() ** norm * mass
        errors.append(error.sum(-1))
    return torch.stack(errors), amax


def assert_first_minimum(w, scale, group, norm, importance=None):
    w, scale = w.cpu(), scale.cpu()
    errors, amax = brute_force(w, group, norm, None if importance is None else importance.cpu())
    shrink = scale.double() * 7 / amax
    trial = (100 - 100 * shrink).round().long()
    assert trial.min() >= 0 and trial.max() < 80
    torch.testing.assert_close(shrink, 1 - trial / 100, rtol=1e-6, atol=0, check_dtype=False)
    chosen = errors.gather(0, trial[None])[0]
    assert (chosen <= errors.amin(0) * (1 + 1e-5)).all()
    earlier = torch.arange(80)[:, None, None] < trial
    assert not (earlier & (errors < chosen * (1 - 1e-5))).any()


@both_modules
@pytest.mark.parametrize("norm", [2.4, 2.0, 3.0, 1.5])
@pytest.mark.parametrize("group", [0, 32, 96])
@pytest.mark.parametrize("weighted", [False, True])
def test_finds_the_first_minimum(device, module, norm, group, weighted):
    w = torch.randn(12, 192, device=device) * torch.logspace(-4, 4, 12, device=device)[:, None]
    w[3] = w[3] ** 3  # heavy tails
    importance = torch.rand(192, device=device) if weighted else None
    scale = module.clip_search(w, norm, group, importance)
    assert scale.dtype == torch.float32 and scale.shape == (12, 192 // group if group else 1)
    assert_first_minimum(w, scale, group, norm, importance)


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    width=st.integers(1, 40),
    norm=st.sampled_from([2.0, 2.4, 1.0]),
    tail=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, rows, groups, width, norm, tail, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * width, generator=generator) ** tail + 1e-3
    scale = ops.clip_search(w.to(device), norm, width)
    assert_first_minimum(w, scale, width, norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_searched_in_float32(device, dtype):
    w = torch.randn(9, 11008, device=device).to(dtype)
    assert torch.equal(ops.clip_search(w), ops.clip_search(w.float()))


@both_modules
def test_a_group_depends_on_nothing_else(device, module):
    w = torch.randn(40, 96, device=device)
    whole = module.clip_search(w, group=32)
    parts = [module.clip_search(part.contiguous()) for part in w.split(32, dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(module.clip_search(w[7:9], group=32), whole[7:9])


@both_modules
def test_edges(device, module):
    w = torch.randn(6, 64, device=device)
    w[1] = 0
    w[2, :32] = 1e-44  # the scale would be subnormal
    w[3, 40] = torch.nan
    w[4, 2] = torch.inf
    scale = module.clip_search(w, group=32)
    assert (scale[1] == 1).all() and scale[2, 0] == 1
    assert scale.isnan().nonzero().tolist() == [[3, 1], [4, 0]]
    assert (scale[scale.isfinite()] > 0).all()
    assert module.clip_search(w[:0]).shape == (0, 1)
    nothing = torch.zeros(64, device=device)  # all trials are equal: the first
    amax = w[5].abs().amax()
    assert module.clip_search(w[5:], importance=nothing) == amax / torch.full_like(amax, 7)


def test_layouts(device):
    w = torch.randn(10, 96, device=device)
    expected = ops.clip_search(w)
    assert torch.equal(ops.clip_search(w.mT.contiguous().mT), expected)
    assert torch.equal(ops.clip_search(torch.cat((w, w), dim=1)[:, :96]), expected)
    odd = torch.cat((w.flatten()[:1], w.flatten()))[1:].view(10, 96)
    assert torch.equal(ops.clip_search(odd), expected)


def test_reads_and_writes_only_its_own(device):
    w, check = poisoned(torch.randn(5, 56, device=device))
    assert ops.clip_search(w).isfinite().all()
    check()


@both_modules
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(64),), r"w must be \[rows, n\]"),
        ((torch.zeros(4, 0),), r"w must be \[rows, n\] with at least one column"),
        ((torch.zeros(4, 64).double(),), "w must be float32, float16 or bfloat16"),
        ((torch.zeros(4, 64), 0.0), "norm must be above 0; got 0"),
        ((torch.zeros(4, 64), 2.4, 48), "group must be 0 or divide 64.*48"),
        ((torch.zeros(4, 64), 2.4, -1), "group must be 0 or divide 64.*-1"),
        ((torch.zeros(4, 64), 2.4, 0, torch.ones(32)), r"importance must have shape \[64\]"),
        ((torch.zeros(4, 64), 2.4, 0, torch.ones(64).half()), "importance must be float32"),
    ],
)
def test_refusals_name_the_argument(device, module, arguments, message):
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=message):
        module.clip_search(*arguments)


@pytest.mark.parametrize("group", [0, 16])
def test_opcheck(device, group):
    importance = torch.rand(64, device=device) if group else None
    torch.library.opcheck(OP, (torch.randn(3, 64, device=device), 2.4, group, importance))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_is_captured_in_a_graph(device):
    w = torch.randn(4, 256, device=device)
    ops.clip_search(w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = ops.clip_search(w)
    w.copy_(torch.randn_like(w))
    graph.replay()
    assert torch.equal(actual, ops.clip_search(w))
