"""Linears: weights survive the kernel layout bit by bit, and products are those of the codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from helpers import NO_CUDA
from quarot.modules.canonical import CanonicalLinear
from quarot.modules.linear import QuantizedLinear, backend_ops
from quarot.ops import reference

K = 128
ROWS = (48, 16, 17)  # an odd number of rows: no layout may rely on a multiple


def canonical(rows: int, *, bits=4, group=0, bias=False, dtype=torch.float32, seed=0):
    """One linear with random contents, and the float64 weight it stands for."""
    generator = torch.Generator().manual_seed(seed + rows)
    linear = CanonicalLinear(K, rows, bits=bits, group=group, bias=bias, dtype=dtype)
    weight = torch.randn(rows, K, generator=generator)
    if bits == 4:
        codes, scale, _ = reference.quantize(weight, 4, group=group or K)
        linear.weight_packed.copy_(reference.pack_int4(codes))
        linear.weight_scale.copy_(scale)
        exact = codes.double().unflatten(1, (scale.shape[1], -1)) * scale.double()[..., None]
        exact = exact.flatten(1)
    else:
        linear.weight.copy_(weight)
        exact = linear.weight.double()
    if bias:
        linear.bias.copy_(torch.randn(rows, generator=generator))
    return linear, exact


def fused(backend="kernel", zero_points=False, bias=True, **options):
    """q, k and v as one linear; only the first has a bias, so that the others' is made up."""
    made = [canonical(rows, bias=bias and rows == ROWS[0], **options) for rows in ROWS]
    parts, exact = [linear for linear, _ in made], torch.cat([weight for _, weight in made])
    shift = torch.cat(
        [
            p.bias.double() if "bias" in p.specs else torch.zeros(p.out_features).double()
            for p in parts
        ]
    )
    bits = options.get("bits", 4)
    linear = QuantizedLinear(parts, bits=bits, zero_points=zero_points, backend=backend)
    before = [{name: getattr(p, name).clone() for name in p.specs} for p in parts]
    linear.fuse(parts)
    return linear, parts, before, exact, shift


def bytes_of(*modules) -> int:
    return sum(buffer.nbytes for module in modules for buffer in module.buffers())


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("options", [{}, {"group": 32}, {"bits": 16}])
def test_fusing_moves_the_weights_and_back(backend: str, options: dict) -> None:
    linear, parts, before, _, _ = fused(backend, **options)
    size = sum(tensor.nbytes for tensors in before for tensor in tensors.values())
    made_up = 4 * sum(ROWS[1:])  # the zero biases of k and v
    assert bytes_of(*parts) == 0
    assert not any(part.state_dict() for part in parts)
    # A kernel may pad the rows (to a multiple of 32 at most), nothing more.
    assert size + made_up <= bytes_of(linear) <= size + made_up + 31 * K // 2

    linear.unfuse(parts)
    assert bytes_of(linear) == 0
    for part, tensors in zip(parts, before, strict=True):
        assert part.state_dict().keys() == tensors.keys()
        assert all(torch.equal(part.state_dict()[name], t) for name, t in tensors.items())


def test_canonical_tensors_share_no_memory() -> None:
    linear, _, _, _, _ = fused()
    tensors = [t for part in linear.canonical() for t in part.values()]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("a_bits", [4, 8, 16])
@pytest.mark.parametrize("options", [{}, {"group": 32}, {"bits": 16}])
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_product_is_that_of_the_codes(
    backend: str, options: dict, a_bits: int, symmetric: bool
) -> None:
    linear, _, _, weight, bias = fused(backend, zero_points=not symmetric, **options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, K, generator=generator) + 0.3
    residual = torch.randn(2, 5, sum(ROWS), generator=generator)
    codes, scale, zero = reference.quantize(x, a_bits, symmetric=symmetric)
    exact = x.double()
    if scale is not None:
        exact = (codes - (0 if zero is None else zero[..., None])).double() * scale.double()[
            ..., None
        ]
    expected = exact @ weight.mT + bias

    got = linear(codes, scale, zero, out_dtype=torch.float32)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    got = linear(codes, scale, zero, residual, out_dtype=torch.float32)
    assert (got - expected - residual).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("zero_points", [True, False])
def test_sums_are_kept_only_for_zero_points(zero_points: bool) -> None:
    linear, _, before, _, _ = fused(zero_points=zero_points, group=32)
    if not zero_points:
        assert linear.weight_sum is None
        return
    codes = torch.cat([reference.unpack_int4(tensors["weight_packed"]) for tensors in before])
    assert torch.equal(linear.weight_sum, codes.unflatten(1, (4, 32)).sum(-1, dtype=torch.int32))


def test_casting_leaves_the_scales_alone() -> None:
    linear, parts, _, _, _ = fused()
    scale = linear.weight_scale.clone()
    linear.to(torch.bfloat16)
    assert torch.equal(linear.weight_scale, scale) and scale.dtype == torch.float32
    assert linear.bias.dtype == torch.bfloat16
    linear.unfuse(parts)
    parts[0].to(torch.float16)
    assert parts[0].weight_scale.dtype == torch.float32
    assert parts[0].bias.dtype == torch.float16


def test_moving_packs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the meta device, the only second one everywhere: by rows, through the layout of each."""
    linear, _, _, _, _ = fused()
    calls = []
    for name in ("unprepack_int4", "prepack_int4"):
        op = getattr(backend_ops("kernel"), name)

        def spy(tensor: Tensor, *sizes: int, name=name, op=op) -> Tensor:
            calls.append((name, tensor.device.type))
            return op(tensor, *sizes)

        monkeypatch.setattr(backend_ops("kernel"), name, spy)
    linear.to("meta")
    assert calls == [("unprepack_int4", "cpu"), ("prepack_int4", "meta")]
    assert all(buffer.is_meta for buffer in linear.buffers())


@pytest.mark.parametrize("options", [{}, {"group": 32}])
def test_moves_to_a_gpu_and_back(options: dict) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{NO_CUDA}: no device")
    linear, _, _, _, _ = fused(zero_points=True, **options)
    codes, scale, zero = reference.quantize(torch.randn(3, K), 8, symmetric=False)
    expected = linear(codes, scale, zero, out_dtype=torch.float32)
    weight = linear.weight
    linear.to("cuda")
    got = linear(codes.cuda(), scale.cuda(), zero.cuda(), out_dtype=torch.float32)
    assert torch.equal(got.cpu(), expected)
    linear.to("cpu")
    assert torch.equal(linear.weight, weight)


def test_copies_compute_the_same() -> None:
    linear, _, _, _, _ = fused()
    codes, scale, zero = reference.quantize(torch.randn(3, K), 8)
    got = copy.deepcopy(linear)(codes, scale, zero, out_dtype=torch.float32)
    assert torch.equal(got, linear(codes, scale, zero, out_dtype=torch.float32))


def test_names_do_not_compute() -> None:
    linear, _ = canonical(8)
    with pytest.raises(RuntimeError, match="neither called nor wrapped"):
        linear(torch.zeros(1, K))


def test_products_need_fused_weights() -> None:
    parts = [canonical(8)[0]]
    linear = QuantizedLinear(parts, bits=4, zero_points=False, backend="reference")
    with pytest.raises(RuntimeError, match=r"call the layer's fuse\(\)"):
        linear(torch.zeros(1, K), None, None, out_dtype=torch.float32)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: got 'cuda', needs one of kernel, reference"):
        backend_ops("cuda")
