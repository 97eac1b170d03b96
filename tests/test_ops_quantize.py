"""ops.quantize, dequantize, pack, unpack and the fused quantizers.

`quantize` must equal its reference bit by bit; the fused ops follow CONTRIBUTING.md's tolerance.
Both are compared with formulas written here on their own, in numpy's float32 or in float64, so that
kernel and reference cannot share a mistake.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import NO_CUDA, assert_codes_agree, dense_hadamard, poisoned, strided
from quarot import hadamard, ops
from quarot.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_modules = pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
QUANTIZERS = [
    {"bits": bits, "symmetric": symmetric, "group": group, "clip": clip}
    for bits, symmetric, group, clip in [
        (4, True, 0, 1.0),
        (4, True, 32, 0.9),
        (4, False, 0, 0.9),
        (4, False, 96, 1.0),
        (8, True, 0, 0.9),
        (8, True, 96, 1.0),
        (8, False, 0, 1.0),
        (8, False, 32, 0.7),
    ]
]


def ident(options):
    kind = "sym" if options["symmetric"] else "asym"
    packed = "-packed" if options.get("packed") else ""
    return f"{options['bits']}-{kind}-g{options['group']}-{options['clip']}{packed}"


each_quantizer = pytest.mark.parametrize("options", QUANTIZERS, ids=ident)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_identical(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
        else:
            assert a.dtype == e.dtype and a.shape == e.shape and a.is_contiguous()
            torch.testing.assert_close(a.cpu(), e.cpu(), rtol=0, atol=0, equal_nan=True)


def same_rows(device):
    """Return how two results of a fused op for the same rows, from other addresses or among other
    rows, are compared: on CUDA these decide the order of a norm's or a transform's sums.
    """
    return assert_identical if device.type == "cpu" else assert_codes_agree


def by_hand(row, bits, symmetric, clip):
    """Quantize one row step by step in numpy float32; returns (codes, scale, zero)."""
    row, one = row.astype(np.float32), np.float32(1)
    clip, half = np.float32(clip), 2 ** (bits - 1)
    if not np.isfinite(row).all():
        return np.zeros(len(row), int), np.float32("nan"), 0
    if symmetric:
        scale = (clip * np.abs(row).max()) / np.float32(half - 1)
    else:
        low, high = clip * min(row.min(), np.float32(0)), clip * max(row.max(), np.float32(0))
        scale = (high - low) / np.float32(2 * half - 1)
    if scale < np.float32(2.0**-126):
        scale = one
    inverse = one / scale
    if symmetric:
        return np.clip(np.rint(row * inverse), -half, half - 1).astype(int), scale, 0
    zero = np.rint(-low * inverse)
    codes = np.clip(np.rint(row * inverse) + zero, 0, 2 * half - 1)
    return codes.astype(int) - half, scale, int(zero) - half


def in_float64(y, bits, symmetric, clip, group):
    """Quantize float64 rows by the formula, for the fused ops' tolerance."""
    shape = y.shape
    y = y.unflatten(-1, (-1, group)) if group else y
    half = 2 ** (bits - 1)
    clip = float(np.float32(clip))
    if symmetric:
        low, span, steps = None, clip * y.abs().amax(-1), half - 1
    else:
        low = clip * y.amin(-1).clamp(max=0)
        span, steps = clip * y.amax(-1).clamp(min=0) - low, 2 * half - 1
    scale = (span / steps).float()
    codes, zero = (y / scale.double()[..., None]).round(), None
    if symmetric:
        codes = codes.clamp(-half, half - 1)
    else:
        offset = (-low / scale.double()).round()
        codes = (codes + offset[..., None]).clamp(0, 2 * half - 1) - half
        zero = (offset - half).int()
    return codes.to(torch.int8).reshape(shape), scale, zero


# quantize, dequantize, pack, unpack


@pytest.mark.parametrize(
    "options", QUANTIZERS + [q | {"packed": True} for q in QUANTIZERS if q["bits"] == 4], ids=ident
)
@each_dtype
def test_quantize_equals_reference_and_hand(device, dtype, options):
    x = (torch.randn(9, 192) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    codes, scale, zero = reference.quantize(x, **options)
    assert_identical(ops.quantize(x.to(device), **options), (codes, scale, zero))
    codes = reference.unpack_int4(codes) if codes.dtype == torch.uint8 else codes
    width = options["group"] or 192
    for i, row in enumerate(x.float().view(-1, width).numpy()):
        hand = by_hand(row, options["bits"], options["symmetric"], options["clip"])
        np.testing.assert_array_equal(codes.view(-1, width)[i].numpy(), hand[0])
        assert scale.flatten()[i].item() == hand[1]
        assert zero is None or zero.flatten()[i].item() == hand[2]


EDGES = {
    "zeros": [0.0] * 8,
    "minus zero": [-0.0] * 8,
    "subnormal": [1e-40, -1e-41, 0.0, 1e-45] * 2,
    "scale floor": [7 * 2.0**-126, 1e-37, -1e-37, 2.0**-126] * 2,
    "below the floor": [6.9 * 2.0**-126, 1e-38, -1e-38, 2.0**-126] * 2,
    "huge": [3e38, -3e38, 1e38, -2e37] * 2,
    "range overflows": [3.4e38, -3.4e38, 1.0, 0.0] * 2,
    "ties": [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -6.5],
    "positive only": [5.0, 6.0, 7.0, 7.5, 5.5, 6.5, 5.1, 7.1],
    "negative only": [-5.0, -6.0, -7.0, -7.5, -5.5, -6.5, -5.1, -7.1],
    "one value": [0.0] * 7 + [3.0],
    "nan": [1.0, math.nan, 2.0, 3.0] * 2,
    "inf": [1.0, math.inf, 2.0, 3.0] * 2,
    "-inf": [1.0, -math.inf, 2.0, 3.0] * 2,
    "inf and nan": [math.inf, -math.inf, math.nan, 0.0] * 2,
}


@pytest.mark.parametrize("row", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_edges(device, row, bits, symmetric):
    x = torch.tensor([row, [1.0] * 8, [*row[4:], *row[:4]]])
    for clip in (1.0, 0.9):
        actual = ops.quantize(x.to(device), bits, symmetric=symmetric, clip=clip)
        assert_identical(actual, reference.quantize(x, bits, symmetric=symmetric, clip=clip))
        with np.errstate(over="ignore", invalid="ignore"):
            codes, scale, zero = by_hand(np.array(row), bits, symmetric, clip)
        if np.isinf(scale):  # the range overflows: inf * 0 is NaN, which no test can compare more
            continue
        np.testing.assert_array_equal(actual[0][0].cpu().numpy(), codes)
        np.testing.assert_array_equal(actual[1][0].item(), scale)
        assert symmetric or actual[2][0].item() == zero


@given(
    rows=st.integers(0, 4),
    groups=st.integers(1, 3),
    width=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    grouped=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    clip=st.floats(0.1, 1.0),
    seed=st.integers(0, 1000),
)
def test_quantize_shapes(device, rows, groups, width, bits, symmetric, grouped, dtype, clip, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * width, generator=generator).to(dtype)
    options = {"symmetric": symmetric, "clip": clip, "group": width if grouped else 0}
    codes, scale, zero = ops.quantize(x.to(device), bits, **options)
    assert_identical((codes, scale, zero), reference.quantize(x, bits, **options))
    back = ops.dequantize(codes, scale, zero)
    assert_identical(
        (back,),
        (reference.dequantize(codes.cpu(), scale.cpu(), zero if zero is None else zero.cpu()),),
    )


@each_quantizer
def test_dequantize_is_close_to_the_input(device, options):
    options = options | {"clip": 1.0}
    x = torch.randn(6, 192, device=device)
    codes, scale, zero = ops.quantize(x, **options)
    width = options["group"] or 192
    error = (ops.dequantize(codes, scale, zero) - x).abs().view(6, -1, width).amax(-1)
    assert (error <= 0.5001 * scale.view(6, -1)).all()


@each_dtype
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dequantize_equals_reference_and_formula(device, dtype, packed, group, symmetric):
    codes = torch.randint(-8, 8, (5, 96), dtype=torch.int8)
    scale = torch.rand((5, 96 // group) if group else (5,)) + 0.1
    zero = None if symmetric else torch.randint(-8, 8, scale.shape, dtype=torch.int32)
    width = group or 96
    offset = 0 if zero is None else zero.view(5, -1, 1)
    exact = (codes.view(5, -1, width).double() - offset) * scale.view(5, -1, 1).double()
    q = ops.pack_int4(codes) if packed else codes
    zero_here = None if zero is None else zero.to(device)
    actual = ops.dequantize(q.to(device), scale.to(device), zero_here, dtype=dtype)
    assert actual.dtype == dtype
    # The product of a float32 and a small integer is rounded once to float32, then to dtype.
    assert torch.equal(actual.cpu(), exact.view(5, 96).float().to(dtype))
    assert torch.equal(actual.cpu(), reference.dequantize(q, scale, zero, dtype=dtype))


@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    pairs=st.integers(0, 70),
    seed=st.integers(0, 100),
)
def test_pack_round_trip(device, shape, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (*shape, 2 * pairs), generator=generator, dtype=torch.int8)
    packed = ops.pack_int4(q.to(device))
    assert packed.dtype == torch.uint8 and packed.shape == (*shape, pairs)
    low, high = q.long()[..., 0::2] % 16, q.long()[..., 1::2] % 16
    assert torch.equal(packed.cpu().long(), low + 16 * high)
    assert torch.equal(ops.unpack_int4(packed).cpu(), q)


def test_unpack_reads_every_byte(device):
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    q = ops.unpack_int4(packed)
    assert q.dtype == torch.int8 and q.min() == -8 and q.max() == 7
    assert torch.equal(ops.pack_int4(q), packed)


# fused quantizers: name -> (op on x and a device, the same value before the quantizer in float64)


def _factor_product(x, size):
    blocks = x.unflatten(-1, (-1, size))
    return (blocks @ dense_hadamard(size) / size**0.5).flatten(-2)


def _norm(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def _gelu_tanh(x):
    return x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _silu(x):
    return x / (1 + torch.exp(-x))


WEIGHT = torch.linspace(0.3, 2, 576)
FUSED = {
    "hadamard full": (
        (200, 576),
        lambda f, x, **o: f.hadamard_quantize(x, **o),
        lambda x: _factor_product(x, 576),
    ),
    "hadamard blocks": (
        (200, 576),
        lambda f, x, **o: f.hadamard_quantize(x, 64, scale_hadamard=0.5, **o),
        lambda x: _factor_product(x, 64) * 4,
    ),
    "rmsnorm": (
        (200, 576),
        lambda f, x, **o: f.rmsnorm_quantize(x, WEIGHT.to(x.device), 1e-5, **o),
        lambda x: _norm(x, WEIGHT, 1e-5),
    ),
    "rmsnorm bf16 weight": (
        (200, 576),
        lambda f, x, **o: f.rmsnorm_quantize(x, WEIGHT.to(x.device, torch.bfloat16), **o),
        lambda x: _norm(x, WEIGHT.bfloat16()),
    ),
    "rmsnorm no weight": (
        (200, 576),
        lambda f, x, **o: f.rmsnorm_quantize(x, **o),
        lambda x: _norm(x, torch.ones(576)),
    ),
    "silu": (
        (200, 1152),
        lambda f, x, **o: f.glu_hadamard_quantize(x, **o),
        lambda x: _silu(x[:, :576]) * x[:, 576:],
    ),
    "silu hadamard": (
        (200, 1152),
        lambda f, x, **o: f.glu_hadamard_quantize(x, "silu", 576, **o),
        lambda x: _factor_product(_silu(x[:, :576]) * x[:, 576:], 576),
    ),
    "gelu hadamard": (
        (200, 1152),
        lambda f, x, **o: f.glu_hadamard_quantize(x, "gelu", None, **o),
        lambda x: _factor_product(_gelu(x[:, :576]) * x[:, 576:], 576),
    ),
    "gelu_tanh": (
        (200, 1152),
        lambda f, x, **o: f.glu_hadamard_quantize(x, "gelu_tanh", 64, **o),
        lambda x: _factor_product(_gelu_tanh(x[:, :576]) * x[:, 576:], 64),
    ),
    "heads": (
        (200, 12, 48),
        lambda f, x, **o: f.head_hadamard_quantize(x, 12, **o),
        lambda x: torch.einsum("thd,hg->tgd", x, dense_hadamard(12)).flatten(1) / 12**0.5,
    ),
    "pairs of heads": (
        (200, 6, 96),
        lambda f, x, **o: f.head_hadamard_quantize(x, None, **o),
        lambda x: _factor_product(x.mT, 2).mT.flatten(1),
    ),
    "heads untransformed": (
        (200, 9, 64),
        lambda f, x, **o: f.head_hadamard_quantize(x, **o),
        lambda x: x.flatten(1),
    ),
}
each_fused = pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)


@each_fused
@each_quantizer
def test_fused_agrees_with_reference_and_float64(device, case, options):
    shape, op, exact = case
    x = torch.randn(shape) * 1.5  # float32: 16-bit values would lie on ties of the grid
    actual = op(ops, x.to(device), **options)
    assert actual[0].shape == (200, 576)
    assert_codes_agree(actual, op(reference, x, **options))
    # A float64 scale is rounded once, a float32 one at every step: compare to a few parts in 1e6.
    codes, scale, zero = in_float64(exact(x.double()), **options)
    torch.testing.assert_close(actual[1].cpu(), scale, rtol=3e-6, atol=0)
    assert_codes_agree((actual[0],), (codes,))
    if zero is not None:
        assert_codes_agree((actual[2],), (zero,))


@each_fused
@each_dtype
def test_fused_dtypes_packing_and_layout(device, case, dtype):
    shape, op, _ = case
    x = torch.randn(3, 2, *shape[1:]).to(device, dtype)
    codes, scale, zero = op(ops, x, symmetric=False)
    assert codes.shape == (3, 2, 576) and scale.shape == zero.shape == (3, 2)
    assert_codes_agree((codes, scale, zero), op(reference, x.cpu(), symmetric=False))
    packed = op(ops, x, symmetric=False, packed=True)
    assert_identical(packed, (ops.pack_int4(codes), scale, zero))
    agree = same_rows(device)
    agree(op(ops, strided(x), symmetric=False), (codes, scale, zero))
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    agree(op(ops, swapped, symmetric=False), (codes, scale, zero))
    agree(op(ops, x[2, 1], symmetric=False), (codes[2, 1], scale[2, 1], zero[2, 1]))


@each_fused
def test_fused_non_finite_rows(device, case):
    shape, op, _ = case
    x = torch.randn(4, *shape[1:], device=device)
    clean = op(ops, x)
    x[1].view(-1)[5], x[2].view(-1)[3] = torch.nan, torch.inf
    codes, scale, _ = op(ops, x)
    assert scale[1].isnan() and not codes[1].any()
    assert scale[2].isnan() and not codes[2].any()
    for row in (0, 3):
        assert torch.equal(codes[row], clean[0][row]) and scale[row] == clean[1][row]


@each_fused
def test_fused_reads_and_writes_only_its_own(device, case):
    shape, op, _ = case
    x, check = poisoned(torch.randn(5, *shape[1:], device=device))
    assert_codes_agree(op(ops, x), op(reference, x))
    check()


@each_fused
def test_fused_zero_rows_and_no_rows(device, case):
    shape, op, _ = case
    codes, scale, _ = op(ops, torch.zeros(2, *shape[1:], device=device))
    assert not codes.any() and (scale == 1).all()
    codes, scale, zero = op(ops, torch.empty(0, *shape[1:], device=device), symmetric=False)
    assert codes.shape == (0, 576) and scale.shape == zero.shape == (0,)


@each_fused
@each_dtype
def test_sixteen_bits_return_the_tensor(device, case, dtype):
    shape, op, exact = case
    x = torch.randn(7, *shape[1:]).to(dtype)
    y, scale, zero = op(ops, x.to(device), bits=16)
    assert scale is None and zero is None and y.dtype == dtype
    expected = exact(x.double())
    limit = torch.finfo(dtype).eps * expected.abs() + 1e-5
    assert ((y.cpu().double() - expected).abs() <= limit).all()


def test_quantize_of_sixteen_bits_is_the_input():
    x = torch.randn(2, 8)
    assert ops.quantize(x, 16) == (x, None, None)


@given(
    rows=st.integers(1, 3),
    order=st.sampled_from([1, 12, 20, 28, 172]),
    power=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_fused_shapes(device, rows, order, power, bits, symmetric, dtype):
    n = order << power
    x = torch.randn(rows, 2 * n).to(dtype)
    options = {"bits": bits, "symmetric": symmetric, "clip": 0.9}
    for op, arguments in (
        ("hadamard_quantize", (x, n)),
        ("rmsnorm_quantize", (x, torch.rand(2 * n))),
        ("glu_hadamard_quantize", (x, "silu", n)),
        ("head_hadamard_quantize", (x.view(rows, 2 * order, -1), order)),
    ):
        here = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        actual = getattr(ops, op)(*here, **options)
        assert_codes_agree(actual, getattr(reference, op)(*arguments, **options))


@pytest.mark.parametrize("n", [14336, 28672, 65536])
def test_fused_huge_rows(device, n):
    x = torch.randn(2, 2 * n)
    for op, *arguments in (("rmsnorm_quantize", None), ("glu_hadamard_quantize", "silu", None)):
        actual = getattr(ops, op)(x.to(device), *arguments)
        assert_codes_agree(actual, getattr(reference, op)(x, *arguments))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("n", [1 << p for p in range(9, 16)])
@pytest.mark.parametrize("group", [0, 64, 128])
def test_fused_transforms_of_powers_of_two(device, n, group):
    """More than few rows of fp32 values: butterflies alone."""
    both = torch.randn(37, 2 * n + 16)[:, : 2 * n]
    for op, x, *arguments in (
        ("hadamard_quantize", both[:, :n], n),
        ("glu_hadamard_quantize", both, "silu", n),
        ("glu_hadamard_quantize", both.bfloat16(), "silu", n),
    ):
        for symmetric in (True, False):
            codes = []
            for module, there in ((ops, x.to(device)), (reference, x)):
                q, scale, zero = getattr(module, op)(
                    there, *arguments, group=group, symmetric=symmetric
                )
                if zero is not None:  # codes move with it
                    q = q.int() - zero.view(37, -1).repeat_interleave(group or n, 1)
                codes.append((q, scale))
            assert_codes_agree(*codes)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("n", [1536, 4096, 5120, 8192, 11008, 13824, 14336, 28672, 32768])
def test_fused_transforms_of_few_rows(device, rows, n):
    """They have a kernel of their own, where a row is one block."""
    for dtype in DTYPES:
        both = torch.randn(rows, 2 * n + 16).to(dtype)[:, : 2 * n]
        for op, x, *arguments in (
            ("hadamard_quantize", both[:, :n], n),
            ("hadamard_quantize", both, n),
            ("glu_hadamard_quantize", both, "silu", n),
            ("glu_hadamard_quantize", both, "gelu", n),
        ):
            for options in ({"bits": 8, "clip": 0.9}, {"bits": 4, "packed": True, "clip": 0.9}):
                actual, expected = (
                    getattr(module, op)(there, *arguments, **options)
                    for module, there in ((ops, x.to(device)), (reference, x))
                )
                if "packed" in options:  # the high code of a byte counts 16 times
                    actual, expected = (
                        (ops.unpack_int4(codes.cpu()), *rest) for codes, *rest in (actual, expected)
                    )
                assert_codes_agree(actual, expected)
            for bits in (4, 8):  # where a zero point lies between two numbers, codes move with it
                codes = []
                for module, there in ((ops, x.to(device)), (reference, x)):
                    q, scale, zero = getattr(module, op)(
                        there, *arguments, bits=bits, symmetric=False
                    )
                    codes.append((q.int() - zero.view(-1, 1), scale))
                assert_codes_agree(*codes)


def test_given_factor_is_used(device):
    factor = hadamard.factor_matrix(12).T.contiguous().to(device)
    x = torch.randn(20, 48, device=device)
    expected = reference.quantize(ops.hadamard(x, 48, factor=factor), 8)
    assert_codes_agree(ops.hadamard_quantize(x, 48, factor=factor, bits=8), expected)
    other = ops.hadamard_quantize(x, 48, bits=8)[0]
    assert (other != expected[0]).any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_of_nothing(device, shape, symmetric):
    x = torch.empty(shape, device=device)
    actual = ops.quantize(x, symmetric=symmetric)
    assert_identical(actual, reference.quantize(x.cpu(), symmetric=symmetric))
    assert ops.dequantize(*actual).shape == shape


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.quantize(x),
        lambda x: ops.hadamard_quantize(x, 1),
        lambda x: ops.rmsnorm_quantize(x),
        lambda x: ops.glu_hadamard_quantize(x),
        lambda x: ops.head_hadamard_quantize(x.unflatten(1, (2, 0)), 2),
    ],
)
def test_rows_without_columns_have_the_scale_of_zeros(device, call):
    # 36 MB of scales: fresh memory of the system, so zeros unless they are written.
    _, scale, _ = call(torch.empty(9 << 20, 0, device=device))
    assert (scale == 1).all()


X = torch.zeros(2, 64)
Q = torch.zeros(2, 64, dtype=torch.int8)


@both_modules
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.quantize(X.double()), "x.*float64"),
        (lambda f: f.quantize(torch.zeros(())), "x.*dimension"),
        (lambda f: f.quantize(X, 5), "bits.*5"),
        (lambda f: f.quantize(X, clip=0.0), "clip.*0"),
        (lambda f: f.quantize(X, clip=1.5), "clip.*1.5"),
        (lambda f: f.quantize(X, group=48), "group.*48"),
        (lambda f: f.quantize(X, group=-32), "group.*-32"),
        (lambda f: f.quantize(X, 8, packed=True), "packed needs bits = 4 .* got bits = 8"),
        (lambda f: f.quantize(torch.zeros(2, 7), packed=True), "packed needs .*even.* 7 columns"),
        (lambda f: f.dequantize(X, torch.ones(2)), "q.*float32"),
        (lambda f: f.dequantize(Q, torch.ones(3)), "scale.*3"),
        (lambda f: f.dequantize(Q, torch.ones(2, 5)), "scale.*5"),
        (lambda f: f.dequantize(Q, torch.ones(2).half()), "scale.*float16"),
        (lambda f: f.dequantize(Q, torch.ones(2), torch.ones(2)), "zero.*int32"),
        (lambda f: f.dequantize(Q, torch.ones(2), dtype=torch.int32), "dtype.*int32"),
        (lambda f: f.pack_int4(Q[:, :7]), "q.*even"),
        (lambda f: f.pack_int4(X), "q.*int8"),
        (lambda f: f.unpack_int4(Q), "packed.*uint8"),
        (lambda f: f.hadamard_quantize(X, 24), "size.*24"),
        (lambda f: f.hadamard_quantize(torch.zeros(2, 188), 188), "^size: got 188"),
        (lambda f: f.head_hadamard_quantize(torch.zeros(2, 9, 64), 9), "^size: got 9[, ]"),
        (lambda f: f.hadamard_quantize(X.long()), "x.*int64"),
        (lambda f: f.rmsnorm_quantize(X, torch.ones(63)), "weight.*63"),
        (lambda f: f.rmsnorm_quantize(X, torch.ones(64).int()), "weight.*int32"),
        (lambda f: f.glu_hadamard_quantize(X, "relu"), "activation.*relu"),
        (lambda f: f.glu_hadamard_quantize(X[:, :63]), "gate_up.*even"),
        (lambda f: f.glu_hadamard_quantize(X, "silu", 64), "size.*64"),
        (lambda f: f.head_hadamard_quantize(X.view(2, 4, 16), 8), "heads.*8"),
        (lambda f: f.head_hadamard_quantize(X[0]), "x.*dimension"),
        (lambda f: f.quantize([1.0]), "'?x'?.*list"),
        (lambda f: f.quantize([1.0], 16), "x must be a tensor; got list"),
        (lambda f: f.quantize(X.int(), 16), "x must be float.*int32"),
        (lambda f: f.quantize(X, 16, group=32), "group and packed .*bits = 16"),
        (lambda f: f.quantize(X, 16, clip=2.0), "clip.*2"),
        (lambda f: f.hadamard_quantize(X, bits=16, packed=True), "group and packed .*bits = 16"),
        (lambda f: f.rmsnorm_quantize(X, bits=16, group=32), "group and packed .*bits = 16"),
        (lambda f: f.glu_hadamard_quantize(X, bits=16, clip=0.0), "clip.*0"),
        (
            lambda f: f.head_hadamard_quantize(X.view(2, 4, 16), bits=16, packed=True),
            "group and packed .*bits = 16",
        ),
    ],
)
def test_refusals_name_the_argument(module, call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(module)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.quantize(x),
        lambda x: ops.hadamard_quantize(x),
        lambda x: ops.rmsnorm_quantize(x),
        lambda x: ops.rmsnorm_quantize(x.detach(), x[0]),
        lambda x: ops.glu_hadamard_quantize(x),
        lambda x: ops.head_hadamard_quantize(x.view(2, 4, 16)),
    ],
)
def test_refuses_tensors_that_require_grad(device, call):
    x = torch.randn(2, 64, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        call(x)
    with torch.no_grad():
        call(x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(device, symmetric):
    q = torch.ops.quarot
    x = torch.randn(3, 96, device=device)
    factor = hadamard.factor_matrix(12).to(device)
    end = (4, symmetric, 0.9, 32, True)
    codes, scale, zero = ops.quantize(x, symmetric=symmetric, group=32)
    for op, arguments in (
        (q.quantize, (x, *end)),
        (q.dequantize, (codes, scale, zero, torch.bfloat16)),
        (q.pack_int4, (codes,)),
        (q.unpack_int4, (ops.pack_int4(codes),)),
        (q.hadamard_quantize, (x, 96, factor, 0.1, *end)),
        (q.rmsnorm_quantize, (x, x[0], 1e-6, *end)),
        (q.glu_hadamard_quantize, (x.repeat(1, 2), "silu", 96, factor, 0.1, *end)),
        (q.head_hadamard_quantize, (x.view(3, 12, 8), 12, factor, 0.1, *end)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_compiles_into_one_graph(device):
    def chain(x, weight):
        codes, scale, zero = ops.rmsnorm_quantize(x, weight, symmetric=False)
        back = ops.dequantize(codes, scale, zero)
        return ops.glu_hadamard_quantize(back, "silu", 48, bits=8)

    x, weight = torch.randn(3, 96, device=device), torch.rand(96, device=device)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_identical(compiled(x, weight), chain(x, weight))


# CUDA: streams, graphs, devices, sizes


def _int4(x):
    return x.clamp(-8, 7).to(torch.int8)


ON_CUDA = {
    "quantize": lambda x: ops.quantize(x, packed=True),
    "quantize groups": lambda x: ops.quantize(x, 8, symmetric=False, group=64),
    "dequantize": lambda x: (ops.dequantize(_int4(x), x[..., 0].float(), dtype=x.dtype),),
    "pack_int4": lambda x: (ops.pack_int4(_int4(x)),),
    "unpack_int4": lambda x: (ops.unpack_int4(_int4(x).view(torch.uint8)),),
    "hadamard_quantize": lambda x: ops.hadamard_quantize(x),
    "rmsnorm_quantize": lambda x: ops.rmsnorm_quantize(x, symmetric=False),
    "glu_hadamard_quantize": lambda x: ops.glu_hadamard_quantize(x, "silu", None),
    "head_hadamard_quantize": lambda x: ops.head_hadamard_quantize(
        x.unflatten(-1, (-1, 64)), None, packed=True
    ),
}
on_cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
each_on_cuda = pytest.mark.parametrize("name", ON_CUDA)


def needs_kernel(name, device):
    op = name.split()[0]
    if ops.kernels()[op][device.type] != "kernel":
        pytest.skip(f"{NO_CUDA}: this build has no {op} kernel")


@on_cuda
@each_on_cuda
def test_runs_on_the_current_stream(device, name):
    needs_kernel(name, device)
    x = torch.randn(512, 4096, device=device)
    expected = ON_CUDA[name](x * 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel on another stream would read x before it is doubled.
        torch.cuda._sleep(10_000_000)
        x.mul_(2)
        actual = ON_CUDA[name](x)
    stream.synchronize()
    assert_identical(actual, expected)


@on_cuda
@each_on_cuda
def test_is_captured_in_a_graph(device, name):
    needs_kernel(name, device)
    x = torch.randn(4, 5120, device=device)
    ON_CUDA[name](x)  # the factor reaches the device before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = ON_CUDA[name](x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_identical(actual, ON_CUDA[name](x))


@on_cuda
@each_on_cuda
def test_runs_on_a_second_device(device, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = torch.randn(3, 1152)
    actual = ON_CUDA[name](x.to("cuda:1"))
    assert actual[0].device.index == 1
    assert_identical(actual, ON_CUDA[name](x.to("cuda:0")))


@on_cuda
@each_on_cuda
@pytest.mark.parametrize(
    ("rows", "n"), [(3_000_000, 128), ((1 << 31) // 4096 + 5, 4096)], ids=["rows", "elements"]
)
def test_sizes_beyond_sixteen_and_thirty_two_bits(device, name, rows, n):
    needs_kernel(name, device)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GB of free memory on the GPU")
    x = torch.randn(rows, n, dtype=torch.bfloat16, device=device)
    actual = ON_CUDA[name](x)
    sums = name in ("hadamard_quantize", "rmsnorm_quantize", "glu_hadamard_quantize")
    agree = same_rows(device) if sums else assert_identical
    for part in (slice(0, 5), slice(rows // 2, rows // 2 + 5), slice(rows - 5, rows)):
        here = tuple(None if t is None else t[part] for t in actual)
        agree(here, ON_CUDA[name](x[part].clone()))


# CUDA: what the kernels distinguish that the shapes above do not reach


def like_the_cpu(op, x, device, **options):
    """Run op(x) on the GPU and on the CPU, of whose kernels the tests above vouch."""
    return op(x.to(device), **options), op(x, **options)


# (columns, group): rows shorter than a warp and longer, up to more than a block holds; groups that
# are lanes of a warp, in rows that lie one after the other and not, and other groups.
ROWS = [(n, 0) for n in (32, 64, 256, 264, 1024, 1152, 8192, 28672, 65544)]
ROWS += [(64, 32), (320, 64), (4096, 128), (28672, 256), (65536, 128), (1344, 96), (4096, 1024)]


@on_cuda
@each_dtype
@pytest.mark.parametrize(("n", "group"), ROWS)
def test_quantize_rows_of_all_lengths(device, dtype, n, group):
    x = torch.randn(7, n + 8)
    x[:, :: n // 3] *= 9
    x[2, 5], x[3, n - 1], x[4] = torch.nan, -torch.inf, 0
    for view in (x.to(dtype)[:, :n], x.to(dtype)[:, :n].contiguous()):
        for bits, symmetric, packed in (
            (4, True, False),
            (4, False, True),
            (8, True, False),
            (8, False, False),
        ):
            options = {"symmetric": symmetric, "packed": packed, "group": group, "clip": 0.9}
            assert_identical(*like_the_cpu(ops.quantize, view, device, bits=bits, **options))


@on_cuda
@each_dtype
@pytest.mark.parametrize("n", [32, 576, 2048, 14336, 28672, 40960])
@pytest.mark.parametrize("group", [0, 32])
def test_rmsnorm_quantize_rows_of_all_lengths(device, dtype, n, group):
    x = torch.randn(6, n + 8)[:, :n].to(dtype)
    x[1, 7], x[2] = torch.inf, 0
    x[3] *= 2.0**-14
    for weight in (None, torch.rand(n) + 0.5, (torch.rand(n) + 0.5).to(dtype)):

        def op(x, weight=weight, **options):
            here = None if weight is None else weight.to(x.device)
            return ops.rmsnorm_quantize(x, here, **options)

        assert_codes_agree(*like_the_cpu(op, x, device, group=group, clip=0.9))
        assert_codes_agree(*like_the_cpu(op, x, device, group=group, bits=8))


# (heads, size, head_dim, group): 1 to 4, 6 and 8 tiles of 16 heads, some not full; more; columns
# that do not fill a warp's; blocks of heads; groups of a part of a head, of one, of several. Not
# fewer than 8 heads: sums of few 16-bit numbers often lie between two codes, exactly.
HEADS = [(h, h, 128, 0) for h in (8, 12, 28, 32, 40, 48, 64, 72, 96, 128, 136)]
HEADS += [(32, 32, 64, 64), (40, 40, 128, 128), (8, 8, 256, 32), (36, 36, 80, 0), (24, 24, 96, 384)]
HEADS += [(24, 8, 64, 0), (24, 8, 64, 64), (28, 28, 8, 0), (8, 8, 1024, 0), (48, 48, 112, 48)]


@on_cuda
@each_dtype
@pytest.mark.parametrize(("heads", "size", "dim", "group"), HEADS)
def test_head_hadamard_quantize_of_all_head_counts(device, dtype, heads, size, dim, group):
    buffer = torch.randn(9, heads * dim + 8).to(dtype)
    buffer[2, 5], buffer[3], buffer[4, -9] = torch.nan, 0, torch.inf
    options = {"heads": size, "group": group, "clip": 0.9}
    for offset, rows in ((0, 7), (8, 9), (1, 5)):  # dense or not, the last one not aligned
        x = buffer[:rows, offset : offset + heads * dim].unflatten(1, (heads, dim))
        for bits, symmetric, packed in ((4, True, True), (4, False, False), (8, True, False)):
            kind = {"bits": bits, "symmetric": symmetric, "packed": packed}
            actual, expected = like_the_cpu(
                ops.head_hadamard_quantize, x, device, **kind, **options
            )
            if packed:
                actual, expected = (
                    (ops.unpack_int4(codes), *rest) for codes, *rest in (actual, expected)
                )
            assert_codes_agree(actual, expected)


@on_cuda
def test_head_hadamard_quantize_of_many_rows(device):
    """More rows than blocks: each works on several."""
    x = torch.randn(5003, 32, 64, dtype=torch.bfloat16)
    for group in (0, 128):
        assert_codes_agree(*like_the_cpu(ops.head_hadamard_quantize, x, device, group=group))


@on_cuda
def test_rmsnorm_quantize_of_many_rows(device):
    """More rows than few: a thread holds more of a row."""
    weight = torch.rand(1024) + 0.5
    x = torch.randn(5003, 1024, dtype=torch.bfloat16)
    x[7] *= 2.0**-60  # a sum of squares that loses bits
    for group in (0, 64):
        actual = ops.rmsnorm_quantize(x.to(device), weight.to(device), group=group)
        assert_codes_agree(actual, ops.rmsnorm_quantize(x, weight, group=group))


def test_rmsnorm_quantize_of_extreme_rows(device):
    """Sums of squares that overflow, and values whose squares underflow."""
    x = torch.randn(4, 512)
    x[0] *= 1e25
    x[1] *= 1e-25
    x[2] *= 1e-12
    weight = torch.linspace(0.5, 2, 512)
    for options in ({}, {"group": 64}):
        actual = ops.rmsnorm_quantize(x.to(device), weight.to(device), **options)
        assert_codes_agree(actual, reference.rmsnorm_quantize(x, weight, **options))


@pytest.mark.parametrize("clip", [1e-3, 1e-6, 1e-30])
def test_tiny_clips(device, clip):
    """Almost all codes are the ends of the range, however far the values are beyond it."""
    x = torch.randn(5, 256)
    for symmetric in (True, False):
        options = {"symmetric": symmetric, "clip": clip}
        expected = reference.quantize(x, **options)
        assert_identical(ops.quantize(x.to(device), **options), expected)


@on_cuda
@each_dtype
def test_misaligned_rows(device, dtype):
    """An address or a stride that is no multiple of 16 bytes."""
    buffer = torch.randn(1 + 6 * 1153, device=device).to(dtype)
    for x in (buffer[1 : 1 + 6 * 1152].view(6, 1152), buffer[: 6 * 1153].view(6, 1153)[:, :1152]):
        assert_identical(ops.quantize(x, packed=True), ops.quantize(x.clone(), packed=True))
        assert_codes_agree(ops.rmsnorm_quantize(x), ops.rmsnorm_quantize(x.clone()))
        weight = torch.rand(1153, device=device)[1:]
        assert_codes_agree(ops.rmsnorm_quantize(x, weight), ops.rmsnorm_quantize(x, weight.clone()))
    codes = torch.randint(-8, 8, (1 + 4096,), dtype=torch.int8, device=device)[1:]
    packed = ops.pack_int4(codes)
    assert torch.equal(packed, ops.pack_int4(codes.clone()))
    odd = torch.cat((packed[:1], packed))[1:]
    assert torch.equal(ops.unpack_int4(odd), codes)
    scale = torch.rand(1, device=device)
    assert torch.equal(ops.dequantize(odd[None], scale), ops.dequantize(packed[None], scale))


@on_cuda
@each_on_cuda
def test_writes_nothing_beside_its_outputs(device, name):
    needs_kernel(name, device)
    x = torch.randn(37, 1152, device=device)
    expected = ON_CUDA[name](x)
    # Outputs will lie in holes that the allocator has between blocks of their sizes.
    sizes = [t.nbytes for t in expected if t is not None]
    blocks = [
        torch.full((size,), 0x7F, dtype=torch.uint8, device=device)
        for size in sizes
        for _ in range(32)
    ]
    del blocks[::2]
    assert_identical(ON_CUDA[name](x), expected)
    assert all((block == 0x7F).all() for block in blocks)


@on_cuda
@pytest.mark.parametrize(
    "name",
    [
        "quantize",
        "hadamard_quantize",
        "rmsnorm_quantize",
        "glu_hadamard_quantize",
        "head_hadamard_quantize",
    ],
)
def test_reads_strided_rows_in_place(device, name):
    needs_kernel(name, device)
    x = torch.randn(256, 8192 + 64, device=device)[:, 32 : 32 + 8192]
    ON_CUDA[name](x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    actual = ON_CUDA[name](x)
    outputs = sum(t.nbytes for t in actual if t is not None)
    assert torch.cuda.max_memory_allocated() - before < outputs + x.nbytes // 4


@on_cuda
def test_refuses_tensors_on_two_devices(device):
    x = torch.randn(2, 64)
    codes, scale, _ = ops.quantize(x)
    for call, message in (
        (lambda: ops.rmsnorm_quantize(x.to(device), torch.ones(64)), "weight.*cpu"),
        (lambda: ops.dequantize(codes.to(device), scale), "scale.*cpu"),
        (lambda: ops.quantize(x.to(device).double()), "x.*float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
