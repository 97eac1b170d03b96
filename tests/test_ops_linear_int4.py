"""ops.linear_int4 and its weight layout: exact integer sums, one float32 epilogue, any shape."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import NO_CUDA, poisoned
from quarot import ops
from quarot.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_modules = pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])


def make(m, n, k, *, bits=8, groups=1, asymmetric=False, seed=0):
    """Random arguments x_q, x_scale, x_zero, w codes (unpacked), w_scale, w_sum."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    half = 2 ** (bits - 1)
    x_q = integers(-half, half, m, k).to(torch.int8)
    x_scale = torch.rand(m, generator=generator) + 0.5
    x_zero = integers(-half, half, m).int() if asymmetric else None
    w = integers(-8, 8, n, k).to(torch.int8)
    w_scale = torch.rand(n, groups, generator=generator) / k
    w_sum = w.view(n, groups, -1).sum(-1, dtype=torch.int32)
    return x_q, x_scale, x_zero, w, w_scale, w_sum


def call(device, x_q, x_scale, x_zero, w, w_scale, w_sum, *addends, out_dtype=torch.float32):
    """Run the op on `device` with the weight codes packed for it."""
    packed = ops.prepack_int4(ops.pack_int4(w.to(device)))
    here = [None if t is None else t.to(device) for t in (x_q, x_scale, x_zero)]
    there = [None if t is None else t.to(device) for t in (w_scale, w_sum, *addends)]
    return ops.linear_int4(*here, packed, *there, out_dtype=out_dtype)


def specified(x_q, x_scale, x_zero, w, w_scale, w_sum, *addends, out_dtype=torch.float32):
    packed = reference.pack_int4(w)
    return reference.linear_int4(
        x_q, x_scale, x_zero, packed, w_scale, w_sum, *addends, out_dtype=out_dtype
    )


def in_int64(x_q, x_scale, x_zero, w, w_scale, w_sum, bias=None, residual=None):
    """The formula, on its own: int64 sums, then float32 in the specified order."""
    groups = w_scale.shape[1]
    y = 0
    for g, (xs, ws) in enumerate(zip(x_q.chunk(groups, -1), w.chunk(groups, -1), strict=True)):
        zero = 0 if x_zero is None else x_zero.long()[..., None]
        acc = ((xs.long() - zero) @ ws.long().T).float()
        y = y + (acc * x_scale[..., None]) * w_scale[:, g]
    for addend in (bias, residual):
        y = y if addend is None else y + addend.float()
    return y


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_reference_and_formula(device, out_dtype, groups, asymmetric, bits):
    arguments = make(5, 37, 192, bits=bits, groups=groups, asymmetric=asymmetric)
    actual = call(device, *arguments, out_dtype=out_dtype)
    assert actual.dtype == out_dtype and actual.shape == (5, 37) and actual.is_contiguous()
    assert torch.equal(actual.cpu(), specified(*arguments, out_dtype=out_dtype))
    assert torch.equal(actual.cpu(), in_int64(*arguments).to(out_dtype))


@pytest.mark.parametrize("addend_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_bias_and_residual(device, addend_dtype, out_dtype):
    arguments = make(4, 33, 64, asymmetric=True)
    bias, residual = torch.randn(33).to(addend_dtype), torch.randn(4, 33).to(addend_dtype)
    for addends in ((bias, None), (None, residual), (bias, residual)):
        actual = call(device, *arguments, *addends, out_dtype=out_dtype)
        assert torch.equal(actual.cpu(), in_int64(*arguments, *addends).to(out_dtype))


@given(
    m=st.integers(0, 9),
    n=st.integers(1, 70),
    k=st.integers(1, 6).map(lambda i: 32 * i),
    groups=st.sampled_from([1, 2, 4]),
    asymmetric=st.booleans(),
    seed=st.integers(0, 100),
)
def test_shapes(device, m, n, k, groups, asymmetric, seed):
    if device.type == "cuda":  # whole steps of 32 columns a group
        groups = math.gcd(groups, k // 32)
    arguments = make(m, n, k, groups=groups, asymmetric=asymmetric, seed=seed)
    assert torch.equal(call(device, *arguments).cpu(), in_int64(*arguments))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 32), (1, 1000, 576), (130, 96, 64), (3, 16, 4096)]
)
def test_sizes(device, m, n, k):
    arguments = make(m, n, k)
    assert torch.equal(call(device, *arguments).cpu(), in_int64(*arguments))


@pytest.mark.parametrize("group", [0, 32, 64, 96, 128])
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(77, 4224), (600, 384), (16, 96)])
def test_every_kernel(m, n, k, group):
    """Each way that a CUDA kernel may be built or picked for; one way on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"{NO_CUDA}: no device")
    if group and k % group:
        group = 32
    arguments = make(m, n, k, groups=k // group if group else 1, asymmetric=m % 2 == 1, seed=m)
    bias, residual = torch.randn(n).bfloat16(), torch.randn(m, n).half()
    expected = in_int64(*arguments, bias, residual)
    for dtype in DTYPES:
        actual = call(torch.device("cuda"), *arguments, bias, residual, out_dtype=dtype)
        assert torch.equal(actual.cpu(), expected.to(dtype))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 33001, 320),  # several strips a warp
        (8, 1032, 28672),  # tokens that only two blocks can hold
        (16, 520, 14336),
        (17, 4096, 2048),  # few tiles: each a part of k for several blocks
        (40, 768, 1120),
        (64, 5120, 1024),
        (100, 1544, 2048),
        (128, 4096, 4096),
        (256, 1280, 8192),
        (64, 4096, 512),  # tiles of few channels
        (256, 28672, 256),  # the same in the last wave
        (1024, 5120, 2048),
        (1100, 5128, 96),
        (2048, 5120, 2080),
        (700, 4104, 160),  # more tiles than processors, whole
    ],
)
def test_divisions_of_the_work(device, m, n, k, residual_dtype):
    """However tiles and parts of k fall to the blocks, each sum is whole."""
    generator = torch.Generator(device).manual_seed(m)
    x_q = torch.randint(-128, 128, (m, k), device=device, generator=generator).to(torch.int8)
    w = torch.randint(-8, 8, (n, k), device=device, generator=generator).to(torch.int8)
    x_scale, w_scale = (torch.rand(i, device=device, generator=generator) for i in (m, n))
    residual = None
    if residual_dtype is not None:
        residual = torch.randn(m, n, device=device, generator=generator).to(residual_dtype)
    acc = (x_q.double() @ w.double().T).float()  # float64 holds the sums exactly
    expected = (acc * x_scale[:, None]) * w_scale
    if residual is not None:
        expected = expected + residual.float()
    packed = ops.prepack_int4(ops.pack_int4(w))
    for dtype in (torch.bfloat16, torch.float32):
        actual = ops.linear_int4(
            x_q, x_scale, None, packed, w_scale[:, None], None, None, residual, out_dtype=dtype
        )
        assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [64, 128, 192, 256, 768])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (12, 4096, 4608),
        (40, 2056, 3072),  # several tiles for some blocks
        (130, 9000, 768),
        (300, 1032, 1344),  # 21 groups of 64
        (1000, 4104, 2304),
        (2100, 2048, 1536),
    ],
)
def test_groups_in_ascending_order(device, m, n, k, group, asymmetric):
    """Tiles of every size, several of them a block: float32 sums in the order of the groups."""
    if k % group:
        group = 64
    groups = k // group
    generator = torch.Generator(device).manual_seed(m)
    x_q = torch.randint(-128, 128, (m, k), device=device, generator=generator).to(torch.int8)
    w = torch.randint(-8, 8, (n, k), device=device, generator=generator).to(torch.int8)
    x_scale = torch.rand(m, device=device, generator=generator)
    w_scale = torch.rand(n, groups, device=device, generator=generator)
    residual = torch.randn(m, n, device=device, generator=generator).bfloat16()
    x_zero, zero = None, torch.zeros(m, device=device).int()
    if asymmetric:
        x_zero = zero = torch.randint(-128, 128, (m,), device=device, generator=generator).int()
    expected = torch.zeros(m, n, device=device)
    for g, (xs, ws) in enumerate(zip(x_q.chunk(groups, -1), w.chunk(groups, -1), strict=True)):
        acc = ((xs.double() - zero[:, None]) @ ws.double().T).float()  # float64 holds it exactly
        expected += (acc * x_scale[:, None]) * w_scale[:, g]
    expected += residual.float()
    w_sum = w.view(n, groups, -1).sum(-1, dtype=torch.int32)
    packed = ops.prepack_int4(ops.pack_int4(w))
    for dtype in (torch.bfloat16, torch.float32):
        actual = ops.linear_int4(
            x_q, x_scale, x_zero, packed, w_scale, w_sum, None, residual, out_dtype=dtype
        )
        assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)])
def test_leading_dimensions(device, shape):
    rows = int(torch.Size(shape).numel())
    x_q, x_scale, x_zero, *weight = make(rows, 17, 64, asymmetric=True)
    residual = torch.randn(*shape, 17)
    shaped = (x_q.view(*shape, 64), x_scale.view(shape), x_zero.view(shape), *weight)
    actual = call(device, *shaped, None, residual)
    assert actual.shape == (*shape, 17)
    expected = in_int64(x_q, x_scale, x_zero, *weight, None, residual.view(-1, 17))
    assert torch.equal(actual.cpu().view(-1, 17), expected)


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("w", [-8, 7])
@pytest.mark.parametrize("zero", [None, -128, 127])
@pytest.mark.parametrize("m", [2, 70])
def test_largest_sums_are_exact(device, m, x, w, zero):
    """k = 28672, all -8 * -128: beyond int16 and float32's 24 bits; zero points cancel."""
    n, k = 3, 28672
    x_q = torch.full((m, k), x, dtype=torch.int8)
    codes = torch.full((n, k), w, dtype=torch.int8)
    codes[1, 5] += 1 if w < 0 else -1  # an odd sum, too
    w_sum = codes.sum(-1, keepdim=True, dtype=torch.int32)
    x_zero = None if zero is None else torch.full((m,), zero, dtype=torch.int32)
    arguments = (x_q, torch.ones(m), x_zero, codes, torch.ones(n, 1), w_sum)
    acc = (x_q.long() - (zero or 0)) @ codes.long().T
    assert torch.equal(call(device, *arguments).cpu(), acc.float())
    assert torch.equal(specified(*arguments), acc.float())


def test_layouts_of_activations(device):
    x_q, x_scale, x_zero, w, w_scale, w_sum = make(6, 24, 64)
    packed = ops.prepack_int4(ops.pack_int4(w.to(device)))
    wide = torch.full((6, 96), 77, dtype=torch.int8, device=device)
    wide[:, 16:80] = x_q.to(device)
    scales = torch.stack((x_scale, x_scale), dim=1).to(device)[:, 0]
    scale = w_scale.to(device)
    actual = ops.linear_int4(wide[:, 16:80], scales, None, packed, scale, out_dtype=torch.float32)
    expected = in_int64(x_q, x_scale, x_zero, w, w_scale, w_sum)
    assert torch.equal(actual.cpu(), expected)
    residual = torch.randn(24, 6, device=device).T
    actual = ops.linear_int4(
        wide[:, 16:80], scales, None, packed, scale, residual=residual, out_dtype=torch.float32
    )
    assert torch.equal(actual.cpu(), expected + residual.cpu())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 32), (3, 17, 96), (7, 64, 64)])
def test_reads_and_writes_only_its_own(device, m, n, k):
    x_q, x_scale, x_zero, w, w_scale, w_sum = make(m, n, k, asymmetric=True)
    bias, residual = torch.randn(n), torch.randn(m, n)
    prepacked = ops.prepack_int4(ops.pack_int4(w.to(device)))
    inputs = [x_q, x_scale, x_zero, prepacked, w_scale, w_sum, bias, residual]
    guarded, checks = zip(*(poisoned(t.to(device)) for t in inputs), strict=True)
    actual = ops.linear_int4(*guarded, out_dtype=torch.float32)
    expected = in_int64(x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual)
    assert torch.equal(actual.cpu(), expected)
    for check in checks:
        check()


def test_a_nan_scale_marks_its_row_only(device):
    arguments = list(make(3, 16, 32))
    expected = in_int64(*arguments)
    arguments[1] = arguments[1].clone()
    arguments[1][1] = torch.nan
    actual = call(device, *arguments).cpu()
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


def test_whole_chain_is_close_to_the_float_product(device):
    """Quantize, multiply, compare with the float64 product of what was quantized."""
    x, weight = torch.randn(6, 192), torch.randn(48, 192)
    for symmetric in (True, False):
        x_q, x_scale, x_zero = ops.quantize(x.to(device), 8, symmetric=symmetric)
        codes, w_scale, _ = ops.quantize(weight.to(device), 4, group=64)
        w_sum = codes.view(48, 3, 64).sum(-1, dtype=torch.int32)
        w = ops.prepack_int4(ops.pack_int4(codes))
        actual = ops.linear_int4(x_q, x_scale, x_zero, w, w_scale, w_sum, out_dtype=torch.float32)
        left = ops.dequantize(x_q, x_scale, x_zero).double()
        right = ops.dequantize(codes, w_scale).double()
        torch.testing.assert_close(actual.double(), left @ right.T, rtol=0, atol=1e-4)


@given(n=st.integers(1, 70), k=st.integers(1, 8).map(lambda i: 32 * i), seed=st.integers(0, 100))
def test_prepack_is_lossless(device, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8).to(device)
    prepacked = ops.prepack_int4(packed)
    assert prepacked.dtype == torch.uint8
    assert prepacked.nbytes < (n + 16) * -(-k // 64) * 32  # tiles of 16 x 64 at most
    assert torch.equal(ops.unprepack_int4(prepacked, n, k), packed)
    columns = packed.T.contiguous().T
    assert torch.equal(ops.prepack_int4(columns), prepacked)


def test_prepack_reads_and_writes_only_its_own(device):
    packed, check = poisoned(torch.randint(0, 256, (19, 48), dtype=torch.uint8, device=device))
    prepacked, check_prepacked = poisoned(ops.prepack_int4(packed))
    assert torch.equal(ops.unprepack_int4(prepacked, 19, 96), packed)
    check()
    check_prepacked()


@pytest.mark.parametrize("offset", [1, 4])
def test_any_alignment(device, offset):
    arguments = make(5, 20, 64)

    def moved(t):
        buffer = torch.empty(t.numel() + offset, dtype=t.dtype, device=device)
        return buffer[offset:].view(t.shape).copy_(t)

    x_q, x_scale, _, w, w_scale, _ = (None if t is None else moved(t) for t in arguments)
    packed = moved(ops.pack_int4(w))
    prepacked = moved(ops.prepack_int4(packed))
    assert torch.equal(ops.unprepack_int4(prepacked, 20, 64), packed)
    bias, residual = moved(torch.randn(20)), moved(torch.randn(5, 20))
    actual = ops.linear_int4(
        x_q, x_scale, None, prepacked, w_scale, None, bias, residual, out_dtype=torch.float32
    )
    assert torch.equal(actual.cpu(), in_int64(*arguments, bias.cpu(), residual.cpu()))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("m", [1, 40, 130])
def test_is_captured_on_the_callers_stream(device, m):
    """A graph replays with new contents; the same inputs give the same bits."""
    first, second = (make(m, 48, 4096, seed=seed) for seed in (1, 2))
    x_q, x_scale, _, w, w_scale, _ = (None if t is None else t.to(device) for t in first)
    prepacked = ops.prepack_int4(ops.pack_int4(w))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.linear_int4(x_q, x_scale, None, prepacked, w_scale, out_dtype=torch.float32)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = ops.linear_int4(x_q, x_scale, None, prepacked, w_scale, out_dtype=torch.float32)
    for arguments in (first, second, second):
        x_q.copy_(arguments[0])
        x_scale.copy_(arguments[1])
        prepacked.copy_(ops.prepack_int4(ops.pack_int4(arguments[3].to(device))))
        w_scale.copy_(arguments[4])
        graph.replay()
        assert torch.equal(out.cpu(), in_int64(*arguments))


X_Q, X_SCALE, X_ZERO, W, W_SCALE, W_SUM = make(2, 16, 64, asymmetric=True)
GOOD = {
    "x_q": X_Q,
    "x_scale": X_SCALE,
    "x_zero": None,
    "w": ops.prepack_int4(ops.pack_int4(W)),
    "w_scale": W_SCALE,
    "w_sum": None,
    "bias": None,
    "residual": None,
    "out_dtype": torch.float32,
}


@both_modules
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_q": X_Q.float()}, "x_q.*int8.*float32"),
        ({"x_q": X_Q[:, :48]}, "x_q.*32.*48"),
        ({"x_q": X_Q[:, :32]}, "w .*"),
        ({"x_scale": X_SCALE.double()}, "x_scale.*float32.*float64"),
        ({"x_scale": X_SCALE[:1]}, r"x_scale.*\[2\].*\[1\]"),
        ({"x_zero": X_ZERO}, "w_sum must be int32 .* got None"),
        ({"x_zero": X_ZERO.long(), "w_sum": W_SUM}, "x_zero.*int32.*int64"),
        ({"x_zero": X_ZERO[:1], "w_sum": W_SUM}, "x_zero.*shape"),
        ({"x_zero": X_ZERO, "w_sum": W_SUM.float()}, "w_sum.*int32.*float32"),
        ({"x_zero": X_ZERO, "w_sum": W_SUM[:, 0]}, "w_sum.*shape"),
        ({"w": W.view(torch.uint8)}, r"w must .*\[16, 32\]"),
        ({"w_scale": W_SCALE[:, 0]}, "w_scale.*groups"),
        ({"w_scale": W_SCALE.half()}, "w_scale.*float32.*float16"),
        ({"w_scale": torch.ones(16, 3)}, "w_scale.*3"),
        ({"bias": torch.ones(15)}, r"bias.*\[16\].*\[15\]"),
        ({"bias": torch.ones(16, dtype=torch.int32)}, "bias.*int32"),
        ({"residual": torch.ones(3, 16)}, r"residual.*\[2, 16\].*\[3, 16\]"),
        ({"residual": torch.ones(2, 16, dtype=torch.float64)}, "residual.*float64"),
        ({"out_dtype": torch.int32}, "out_dtype.*int32"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_argument(module, changes, message):
    canonical = {"w": ops.pack_int4(W)} if module is reference else {}
    with pytest.raises(RuntimeError, match=message):
        module.linear_int4(**(GOOD | canonical | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_q": X_Q.view(torch.uint8)[:, :32]}, "x_q.*packed"),
        ({"w": ops.pack_int4(W)}, r"w must .*\[16, 32\]"),
    ],
)
def test_the_kernel_refuses_other_layouts(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear_int4(**(GOOD | changes))


@both_modules
@pytest.mark.parametrize(
    ("call_", "message"),
    [
        (lambda f: f.prepack_int4(X_Q), "w_packed.*uint8"),
        (lambda f: f.prepack_int4(torch.zeros(4, 8, dtype=torch.uint8)), "w_packed.*32.*16"),
        (lambda f: f.prepack_int4(torch.zeros(64, dtype=torch.uint8)), "w_packed.*n, k"),
        (lambda f: f.unprepack_int4(GOOD["w"], 17, 64), "w .*shape"),
        (lambda f: f.unprepack_int4(GOOD["w"], 16, 48), "k.*32.*48"),
    ],
)
def test_prepack_refusals_name_the_argument(module, call_, message):
    with pytest.raises(RuntimeError, match=message):
        call_(module)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", ["x_scale", "w", "w_scale"])
def test_refuses_mixed_devices(device, name):
    here = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in GOOD.items()}
    here["w"] = ops.prepack_int4(ops.pack_int4(W).to(device))  # that device's layout
    with pytest.raises(RuntimeError, match=rf"{name} must .*device"):
        ops.linear_int4(**(here | {name: GOOD[name]}))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("m", [1, 9, 70])
def test_packed_activations(device, m, groups):
    """Where tensor cores multiply int4 (sm_80 to sm_89) the product is the same, else refused."""
    x_q, *others = make(m, 40, 192, bits=4, groups=groups, asymmetric=True)
    if torch.cuda.get_device_capability(device)[0] == 8:
        actual = call(device, ops.pack_int4(x_q), *others)
        assert torch.equal(actual.cpu(), in_int64(x_q, *others))
    else:
        with pytest.raises(RuntimeError, match=r"x_q: packed codes.*uint8"):
            call(device, ops.pack_int4(x_q), *others)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_limits_of_the_cuda_layout(device):
    with pytest.raises(RuntimeError, match=r"w_packed.*131040.*131072"):
        ops.prepack_int4(torch.zeros(1, 65536, dtype=torch.uint8, device=device))
    x_q, x_scale, x_zero, w, w_scale, w_sum = make(2, 16, 96, groups=2)
    with pytest.raises(RuntimeError, match="w_scale: 2 groups.*multiples of 32"):
        call(device, x_q, x_scale, x_zero, w, w_scale, w_sum)


@pytest.mark.parametrize("name", ["bias", "residual"])
def test_refuses_tensors_that_require_grad(name):
    shape = {"bias": (16,), "residual": (2, 16)}[name]
    arguments = GOOD | {name: torch.zeros(shape, requires_grad=True)}
    with pytest.raises(RuntimeError, match=r"linear_int4: .*requires grad"):
        ops.linear_int4(**arguments)
    with torch.no_grad():
        ops.linear_int4(**arguments)


def test_opcheck(device):
    q = torch.ops.quarot
    x_q, x_scale, x_zero, w, w_scale, w_sum = (
        t.to(device) for t in make(3, 20, 64, groups=2, asymmetric=True)
    )
    packed = ops.pack_int4(w)
    prepacked = ops.prepack_int4(packed)
    bias, residual = torch.randn(20, device=device), torch.randn(3, 20, device=device)
    for op, arguments in (
        (q.prepack_int4, (packed,)),
        (q.unprepack_int4, (prepacked, 20, 64)),
        (q.linear_int4, (x_q, x_scale, None, prepacked, w_scale, None, None, None, torch.bfloat16)),
        (
            q.linear_int4,
            (x_q, x_scale, x_zero, prepacked, w_scale, w_sum, bias, residual, torch.float32),
        ),
    ):
        torch.library.opcheck(op.default, arguments)


def test_compiles_into_one_graph(device):
    x, (_, _, _, w, w_scale, _) = torch.randn(3, 64, device=device), make(1, 20, 64)
    prepacked, w_scale = ops.prepack_int4(ops.pack_int4(w.to(device))), w_scale.to(device)

    def layer(x):
        x_q, x_scale, x_zero = ops.rmsnorm_quantize(x)
        return ops.linear_int4(x_q, x_scale, x_zero, prepacked, w_scale, out_dtype=x.dtype)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
