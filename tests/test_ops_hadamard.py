"""ops.hadamard: accuracy against dense float64 products, layouts, refusals, torch integration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import NO_CUDA, assert_accurate, dense_hadamard, poisoned, strided
from quarot import hadamard, ops
from quarot.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_modules = pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
OP = torch.ops.quarot.hadamard.default


def needs_kernel(device):
    if ops.kernels()["hadamard"][device.type] != "kernel":
        pytest.skip(f"{NO_CUDA}: this build has no hadamard kernel")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "size"), [(64, 64), (96, 96), (576, 576), (576, 36), (688, 688), (1536, 1536), (512, 4)]
)
def test_accuracy_against_dense(device, dtype, n, size):
    x = torch.randn(7, n).to(dtype)
    dense = dense_hadamard(size)
    blocks = x.double().view(7, -1, size)
    exact = (blocks @ dense / size**0.5).view(7, n)
    matrix = (dense / size**0.5).to(dtype)
    in_torch = (x.view(7, -1, size) @ matrix).view(7, n)
    assert_accurate(ops.hadamard(x.to(device), size), in_torch, exact)


@pytest.mark.parametrize("n", [11008, 14336, 29568, 65536])
def test_accuracy_of_huge_rows(device, n):
    x = torch.randn(2, n)
    exact = hadamard.transform(x.double())
    assert_accurate(ops.hadamard(x.to(device)), hadamard.transform(x), exact)


@given(
    rows=st.integers(0, 5),
    order=st.sampled_from([1, 2, 12, 20, 28, 36, 40, 172]),
    power=st.integers(0, 6),
    blocks=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_shapes(device, rows, order, power, blocks, dtype):
    size = order << power
    x = torch.randn(rows, blocks * size).to(dtype)
    actual = ops.hadamard(x.to(device), size)
    assert actual.device.type == device.type and actual.is_contiguous()
    in_torch = hadamard.transform(x.float(), size).to(dtype)  # fp32 sums, as a dense product has
    assert_accurate(actual, in_torch, hadamard.transform(x.double(), size))


def test_size_one_is_the_identity_times_scale(device):
    x = torch.randn(3, 5, device=device)
    assert torch.equal(ops.hadamard(x, 1), x)
    assert torch.equal(ops.hadamard(x, 1, scale=0.5), x * 0.5)


def test_given_factor_and_scale(device):
    factor = hadamard.factor_matrix(12).T.contiguous()
    x = torch.randn(4, 96)
    exact = x.double() @ torch.kron(factor.double(), dense_hadamard(8)) * 0.25
    in_torch = x @ (torch.kron(factor.double(), dense_hadamard(8)) * 0.25).float()
    actual = ops.hadamard(x.to(device), factor=factor.to(device), scale=0.25)
    assert_accurate(actual, in_torch, exact)


@pytest.mark.parametrize("shape", [(576,), (1, 576), (2, 3, 4, 576), (0, 576), (3, 0)])
def test_leading_dimensions(device, shape):
    x = torch.randn(shape, device=device)
    actual = ops.hadamard(x)
    assert actual.shape == shape and actual.dtype == x.dtype
    if x.numel():
        flat = ops.hadamard(x.reshape(-1, 576))
        assert torch.equal(actual.view(-1, 576), flat)


def assert_same_rows(actual, expected):
    """Equal on the CPU. On CUDA how many rows there are, and where, decides the order of sums."""
    ulp = {torch.float32: 0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[expected.dtype]
    rtol, atol = (0, 0) if expected.device.type == "cpu" else (ulp, 4e-6)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_layouts(device):
    x = torch.randn(6, 4, 96, device=device)
    expected = ops.hadamard(x)
    assert_same_rows(ops.hadamard(strided(x)), expected)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_rows(ops.hadamard(transposed), expected)
    columns = x.mT.contiguous().mT
    assert_same_rows(ops.hadamard(columns), expected)
    assert_same_rows(ops.hadamard(x[:1].expand(6, 4, 96)), expected[:1].expand(6, 4, 96))
    odd_offset = torch.randn(6 * 96 + 1, device=device)[1:].view(6, 96)
    assert_same_rows(ops.hadamard(odd_offset), ops.hadamard(odd_offset.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 28), (5, 36), (3, 64), (3, 576), (37, 2048)])
def test_reads_and_writes_only_its_own(device, dtype, shape):
    x, check = poisoned(torch.randn(shape).to(device, dtype))
    assert ops.hadamard(x).isfinite().all()
    check()


def test_non_finite_values_stay_in_their_block(device):
    x = torch.randn(4, 96, device=device)
    clean = ops.hadamard(x, 12)
    x[1, 13], x[2, 95] = torch.nan, torch.inf
    actual = ops.hadamard(x, 12)
    touched = torch.zeros(4, 8, dtype=torch.bool, device=device)
    touched[1, 1] = touched[2, 7] = True
    touched = touched.repeat_interleave(12, dim=1)
    assert not actual[touched].isfinite().any()
    assert torch.equal(actual[~touched], clean[~touched])


@both_modules
@pytest.mark.parametrize(
    ("x", "size", "options", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.float64), None, {}, "x.*float64"),
        (torch.zeros(2, 64, dtype=torch.int32), None, {}, "x.*int32"),
        (torch.zeros(()), 1, {}, "x.*dimension"),
        ([1.0], None, {}, "'?x'?.*list"),
        ([1.0], 12, {}, "'?x'?.*list"),
        (torch.zeros(2, 64), 128, {}, "size.*128"),
        (torch.zeros(2, 64), 24, {}, "size.*24"),
        (torch.zeros(2, 64), 0, {}, "size.*0"),
        (torch.zeros(2, 64), -4, {}, "size.*-4"),
        (torch.zeros(2, 92), 92, {}, "size.*92"),
        (torch.zeros(2, 48), 48, {"factor": torch.ones(12, 12)}, "factor.*int8"),
        (
            torch.zeros(2, 48),
            48,
            {"factor": torch.ones(12, 10, dtype=torch.int8)},
            "factor.*square",
        ),
        (
            torch.zeros(2, 48),
            48,
            {"factor": torch.ones(20, 20, dtype=torch.int8)},
            "size.*20.*factor|size.*factor.*20.*48",
        ),
    ],
)
def test_refusals_name_the_argument(module, x, size, options, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        module.hadamard(x, size, **options)


def test_refuses_tensors_that_require_grad(device):
    x = torch.randn(2, 64, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"hadamard: .*requires grad"):
        ops.hadamard(x)
    with torch.no_grad():
        assert not ops.hadamard(x).requires_grad


@pytest.mark.parametrize("n", [64, 96])
def test_opcheck(device, n):
    factor = hadamard.factor_matrix(12).to(device) if n == 96 else None
    torch.library.opcheck(OP, (torch.randn(3, n, device=device), n, factor, 0.5))


def test_compiles_into_one_graph(device):
    x = torch.randn(3, 96, device=device)
    compiled = torch.compile(lambda t: ops.hadamard(t, 96) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ops.hadamard(x) + 1, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_runs_on_the_current_stream(device):
    needs_kernel(device)
    x = torch.randn(512, 4096, device=device)
    expected = ops.hadamard(x * 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            10_000_000
        )  # a kernel on another stream would read x before it is doubled
        x.mul_(2)
        actual = ops.hadamard(x)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_is_captured_in_a_graph(device):
    needs_kernel(device)
    x = torch.randn(4, 5120, device=device)
    ops.hadamard(x)  # the factor reaches the device before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = ops.hadamard(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(actual, ops.hadamard(x))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_runs_on_a_second_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = torch.randn(3, 576)
    actual = ops.hadamard(x.to("cuda:1"))
    assert actual.device.index == 1
    assert torch.equal(actual.cpu(), ops.hadamard(x.to("cuda:0")).cpu())


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("rows", "n"), [(3_000_000, 128), ((1 << 31) // 4096 + 5, 4096)], ids=["rows", "elements"]
)
def test_sizes_beyond_sixteen_and_thirty_two_bits(device, rows, n):
    needs_kernel(device)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GB of free memory on the GPU")
    x = torch.randn(rows, n, dtype=torch.bfloat16, device=device)
    actual = ops.hadamard(x)
    for part in (slice(0, 5), slice(rows // 2, rows // 2 + 5), slice(rows - 5, rows)):
        assert_same_rows(actual[part], ops.hadamard(x[part].clone()))


POWERS = [1 << p for p in range(5, 17)]
MODELS = [96, 576, 1536, 5120, 11008, 12288, 13824, 14336, 18944, 28672, 29568]


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", POWERS + MODELS)
def test_accuracy_at_all_sizes(device, n, dtype):
    """Rows that lie apart and rows that follow each other, few (a kernel of their own) and more."""
    size = hadamard.split(n)[0]
    x = torch.randn(19, n + 8).to(dtype)[:, :n]
    exact = hadamard.transform(x.double(), size)
    in_torch = hadamard.transform(x, size)
    there = x.to(device)
    for rows in (3, 19):
        for view in (there[:rows], there[:rows].contiguous()):
            assert_accurate(ops.hadamard(view, size), in_torch[:rows], exact[:rows])


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_rows(device, dtype):
    """An address or a stride that is no multiple of 16 bytes."""
    buffer = torch.randn(1 + 6 * 577).to(dtype)
    on_device = buffer.to(device)

    def views(b):
        return b[1 : 1 + 6 * 576].view(6, 576), b[: 6 * 577].view(6, 577)[:, :576]

    for x, there in zip(views(buffer), views(on_device), strict=True):
        exact = hadamard.transform(x.double())
        assert_accurate(ops.hadamard(there), hadamard.transform(x), exact)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_reads_strided_rows_in_place(device):
    needs_kernel(device)
    x = torch.randn(256, 8192 + 64, device=device)[:, 32 : 32 + 8192]
    ops.hadamard(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.hadamard(x)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + x.nbytes // 4


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_writes_nothing_beside_its_output(device):
    needs_kernel(device)
    x = torch.randn(37, 1152, device=device)
    expected = ops.hadamard(x)
    # The output will lie in a hole that the allocator has between blocks of its size.
    blocks = [torch.full_like(x, torch.nan) for _ in range(32)]
    del blocks[::2]
    assert torch.equal(ops.hadamard(x), expected)
    assert all(block.isnan().all() for block in blocks)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_refuses_tensors_on_two_devices(device):
    x = torch.randn(2, 48, device=device)
    with pytest.raises(RuntimeError, match="factor.*cpu"):
        OP(x, 48, hadamard.factor_matrix(12), 1.0)
