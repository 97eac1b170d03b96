"""ops.rope_hadamard_kv_append: rotation, quantization and placement of new keys and values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    NO_CUDA,
    assert_accurate,
    cache_values,
    dense_hadamard,
    paged,
    poisoned,
    random_cache,
)
from quarot import hadamard, ops
from quarot.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_modules = pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])


def inputs(batch, seq, heads, kv_heads, dim, *, rotary=None, dtype=torch.float32, one_angle=False):
    """q, k, v, cos, sin; the angles are those of positions 3, 4 … with two different halves."""
    q, k, v = (torch.randn(batch, seq, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    angles = torch.randn(1 if one_angle else batch, seq, rotary if rotary is not None else dim)
    return q, k, v, angles.cos(), angles.sin()


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


def rotated(x, cos, sin, size):
    """RoPE and Hadamard in float64 by the formula, pair by pair."""
    x, cos, sin = x.double().clone(), cos.double(), sin.double()
    half = cos.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        j = i + half
        out[..., i] = x[..., i] * cos[:, :, None, i] - x[..., j] * sin[:, :, None, i]
        out[..., j] = x[..., j] * cos[:, :, None, j] + x[..., i] * sin[:, :, None, j]
    return (out.unflatten(-1, (-1, size)) @ dense_hadamard(size) / size**0.5).flatten(-2)


def append(module, device, tensors, cache, start, **options):
    """Run on a copy of the cache; returns q and the cache, on the CPU."""
    cache = [t.clone().to(device) for t in cache]
    q = module.rope_hadamard_kv_append(
        *(t.to(device) for t in tensors), *cache, start.to(device), **options
    )
    return q.cpu(), [t.cpu() for t in cache]


def assert_caches_agree(actual, expected, bits, exact_values=True):
    """v bit by bit; k (after a transform) with codes off by one and scales an ulp apart, rarely."""
    for half, exact in ((slice(0, 3), False), (slice(3, 6), exact_values)):
        codes, scale, zero = actual[half]
        codes_e, scale_e, zero_e = expected[half]
        torch.testing.assert_close(scale.isnan(), scale_e.isnan())
        if exact:
            assert torch.equal(codes, codes_e) and torch.equal(zero, zero_e)
            assert torch.equal(scale.nan_to_num(0), scale_e.nan_to_num(0))
            continue
        limit = max(2, 1e-3 * codes.numel() * 8 / bits)
        if bits == 4:
            codes, codes_e = (torch.stack((c & 15, c >> 4)) for c in (codes, codes_e))
        for a, e in ((codes, codes_e), (zero, zero_e)):
            apart = (a.int() - e.int()).abs()
            assert apart.max() <= 1 and (apart > 0).sum() <= limit
        torch.testing.assert_close(scale, scale_e, rtol=2**-10, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "size"),
    [
        (4, 2, 64, 64, 64),
        (9, 3, 64, 32, 64),
        (2, 2, 96, 96, 96),
        (2, 1, 32, 16, 1),
        (3, 3, 80, 80, 16),
    ],
)
def test_agrees_with_reference_and_formula(device, bits, dtype, heads, kv_heads, dim, rotary, size):
    tensors = inputs(2, 5, heads, kv_heads, dim, rotary=rotary, dtype=dtype)
    cache = random_cache(2, kv_heads, 16, dim, bits, torch.device("cpu"))
    start = starts(0, 7)
    options = {"bits": bits, "size": size, "k_clip": 1.0, "v_clip": 1.0}
    q, actual = append(ops, device, tensors, cache, start, **options)
    q_reference, expected = append(reference, "cpu", tensors, cache, start, **options)
    assert q.dtype == dtype and q.is_contiguous()
    exact = rotated(tensors[0], *tensors[3:], size)
    assert_accurate(q, q_reference, exact)
    assert_caches_agree(actual, expected, bits)
    for half, x in (
        (actual[:3], rotated(tensors[1], *tensors[3:], size)),
        (actual[3:], tensors[2].double()),
    ):
        values, scale = cache_values(*half, bits), half[1].double()
        for b, first in enumerate((0, 7)):
            here = slice(first, first + 5)
            # Half a step; the scale was rounded to 11 bits after the range was fixed, so that the
            # ends of the range may miss up to 2^bits * 2^-11 steps more.
            step = scale[b, :, here, None] * (0.501 + 2**bits * 2**-11)
            assert ((values[b, :, here] - x[b].transpose(0, 1)).abs() <= step).all()


def by_hand(x, bits, clip):
    """One vector of values, step by step: codes, scale, zero."""
    top = 2**bits - 1
    x, clip = x.float(), torch.tensor(clip, dtype=torch.float32)
    low, high = clip * min(x.min(), torch.zeros(())), clip * max(x.max(), torch.zeros(()))
    scale = ((high - low) / torch.tensor(float(top))).clamp(2.0**-14, 65504.0).half()
    inverse = 1 / scale.float()
    zero = (-low * inverse).round().clamp(0, top)
    codes = ((x * inverse).round() + zero).clamp(0, top)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.95, 0.5])
def test_values_are_quantized_as_specified(device, bits, clip):
    rows = torch.stack(
        [
            torch.randn(32),
            torch.zeros(32),
            torch.rand(32) + 5,  # the range includes zero all the same
            -torch.rand(32) - 5,
            torch.randn(32) * 1e-6,  # below the smallest scale
            torch.randn(32) * 1e6,  # above the largest one at 4 bits
            torch.full((32,), 3e38),
            torch.cat((torch.zeros(31), torch.tensor([0.125]))),
        ]
    )
    k = v = rows.view(1, 8, 1, 32)
    angles = torch.zeros(1, 8, 32)
    tensors = (torch.zeros_like(k), k, v, angles.cos(), angles.sin())
    cache = random_cache(1, 1, 8, 32, bits, torch.device("cpu"))
    options = {"bits": bits, "k_clip": clip, "v_clip": clip}
    _, actual = append(ops, device, tensors, cache, starts(0), **options)
    _, expected = append(reference, "cpu", tensors, cache, starts(0), **options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for half in (actual[:3], actual[3:]):  # angle 0 and no transform leave k as it is
        for i, row in enumerate(rows):
            codes, scale, zero = by_hand(row, bits, clip)
            stored = half[0][0, 0, i]
            if bits == 4:
                stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten()
            assert torch.equal(stored, codes)
            assert half[1][0, 0, i] == scale and half[2][0, 0, i] == zero


def test_each_clip_is_its_own(device):
    tensors = inputs(1, 3, 2, 2, 32)
    cache = random_cache(1, 2, 4, 32, 4, torch.device("cpu"))
    _, both = append(ops, device, tensors, cache, starts(0), bits=4, k_clip=0.5, v_clip=0.5)
    _, mixed = append(ops, device, tensors, cache, starts(0), bits=4, k_clip=0.5, v_clip=0.9)
    for a, b in zip(both[:3], mixed[:3], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(both[4], mixed[4])


@given(
    seq=st.integers(0, 5),
    start=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
)
def test_writes_only_its_positions(device, seq, start, kv_heads, bits):
    batch = len(start)
    tensors = inputs(batch, seq, kv_heads * 2, kv_heads, 32, one_angle=True)
    cache = random_cache(batch, kv_heads, 11, 32, bits, torch.device("cpu"))
    options = {"bits": bits, "size": 32}
    _, actual = append(ops, device, tensors, cache, starts(*start), **options)
    _, expected = append(reference, "cpu", tensors, cache, starts(*start), **options)
    assert_caches_agree(actual, expected, bits)
    for b, first in enumerate(start):
        untouched = torch.ones(11, dtype=torch.bool)
        untouched[first : first + seq] = False
        for after, before in zip(actual, cache, strict=True):
            assert torch.equal(after[b][:, untouched], before[b][:, untouched])


def test_token_by_token_equals_all_at_once(device):
    tensors = inputs(2, 6, 4, 2, 64)
    cache = random_cache(2, 2, 8, 64, 4, torch.device("cpu"))
    q, expected = append(ops, device, tensors, cache, starts(1, 2), bits=4, size=64)
    for t in range(6):
        token = [x[:, t : t + 1] for x in tensors]
        q_t, cache = append(ops, device, token, cache, starts(1 + t, 2 + t), bits=4, size=64)
        assert torch.equal(q_t, q[:, t : t + 1])
    for a, e in zip(cache, expected, strict=True):
        assert torch.equal(a, e)


def test_views_of_one_buffer(device):
    """q, k and v as the qkv linear leaves them."""
    batch, seq, heads, kv_heads, dim = 2, 3, 4, 2, 32
    qkv = torch.randn(batch, seq, (heads + 2 * kv_heads) * dim)
    parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    views = [p.unflatten(-1, (-1, dim)) for p in parts]
    angles = torch.randn(1, seq, dim)
    cache = [t.to(device) for t in random_cache(batch, kv_heads, 8, dim, 4, torch.device("cpu"))]
    copies = [t.clone() for t in cache]
    shared = [angles.cos().to(device), angles.sin().to(device)]
    start = starts(0, 2).to(device)
    options = {"bits": 4, "size": 32}
    on_device = qkv.to(device).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    strided = [p.unflatten(-1, (-1, dim)) for p in on_device]
    q = ops.rope_hadamard_kv_append(*strided, *shared, *cache, start, **options)
    dense = [v.contiguous().to(device) for v in views]
    assert torch.equal(q, ops.rope_hadamard_kv_append(*dense, *shared, *copies, start, **options))
    for a, e in zip(cache, copies, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("bits", [4, 8])
def test_non_finite_vectors_become_nan(device, bits):
    tensors = inputs(1, 4, 2, 2, 32)
    tensors[1][0, 1, 0, 3] = torch.nan
    tensors[2][0, 2, 1, 5] = torch.inf
    cache = random_cache(1, 2, 4, 32, bits, torch.device("cpu"))
    _, actual = append(ops, device, tensors, cache, starts(0), bits=bits, size=32)
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = actual
    assert k_scale[0, 0, 1].isnan() and k_scale.isnan().sum() == 1
    assert v_scale[0, 1, 2].isnan() and v_scale.isnan().sum() == 1
    assert not k_codes[0, 0, 1].any() and k_zero[0, 0, 1] == 0
    assert not v_codes[0, 1, 2].any() and v_zero[0, 1, 2] == 0


def test_given_factor_is_used(device):
    factor = hadamard.factor_matrix(12).T.contiguous().to(device)
    tensors = inputs(1, 2, 2, 1, 96)
    cache = random_cache(1, 1, 4, 96, 8, torch.device("cpu"))
    options = {"bits": 8, "size": 96}
    q, actual = append(ops, device, tensors, cache, starts(0), **options, factor=factor)
    q_e, expected = append(
        reference, "cpu", tensors, cache, starts(0), **options, factor=factor.cpu()
    )
    torch.testing.assert_close(q, q_e)
    assert_caches_agree(actual, expected, 8)
    plain, _ = append(ops, device, tensors, cache, starts(0), **options)
    assert not torch.allclose(q, plain)


def test_reads_and_writes_only_its_own(device):
    tensors = inputs(2, 3, 4, 2, 40, rotary=24)
    cache = random_cache(2, 2, 3, 40, 4, torch.device("cpu"))  # written from end to end
    guarded, checks = zip(*(poisoned(t.to(device)) for t in tensors), strict=True)
    written, written_checks = zip(*(poisoned(t.to(device)) for t in cache), strict=True)
    options = {"bits": 4, "size": 8}
    start = starts(0, 0).to(device)
    q = ops.rope_hadamard_kv_append(*guarded, *written, start, **options)
    assert q.isfinite().all()
    for check in checks:
        check()
    _, expected = append(reference, "cpu", tensors, cache, starts(0, 0), **options)
    assert_caches_agree([t.cpu() for t in written], expected, 4)
    for tensor, original, check in zip(written, cache, written_checks, strict=True):
        tensor.copy_(original)
        check()  # only the surroundings are left to differ


@pytest.mark.parametrize("start", [(3, 0), (0, 6), (-1, 0), (0, 2**31 - 1)])
def test_never_writes_outside_the_capacity(start):
    tensors = inputs(2, 2, 2, 2, 32)
    cache = random_cache(2, 2, 4, 32, 4, torch.device("cpu"))
    for module in (ops, reference):
        guarded, checks = zip(*(poisoned(t) for t in cache), strict=True)
        with pytest.raises(RuntimeError, match=r"start.*capacity") as error:
            module.rope_hadamard_kv_append(*tensors, *guarded, starts(*start), bits=4)
        assert ".cpp" not in str(error.value)  # a caller's mistake, not ours
        for check in checks:
            check()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("module", "dim"),
    [(reference, 80), *((ops, dim) for dim in (32, 64, 80, 96, 128, 256))],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_paged_cache_equals_one_that_is_not(module, device, dim, bits):
    tensors = inputs(3, 21, 4, 2, dim, dtype=torch.bfloat16)
    cache = random_cache(3, 2, 96, dim, bits, torch.device("cpu"))
    start = starts(0, 75, 33)
    options = {"bits": bits, "size": 16}
    q, expected = append(module, device, tensors, cache, start, **options)
    for size in (16, 48):
        # No entry is -7 here: nothing is beyond a length.
        blocks, table = paged(cache, size, starts(96, 96, 96))
        q_paged, actual = append(
            module, device, tensors, blocks, start, **options, block_table=table.to(device)
        )
        assert torch.equal(q, q_paged)
        others = torch.ones(blocks[0].shape[0], dtype=torch.bool)
        others[table.flatten().long()] = False
        for a, e, before in zip(actual, expected, blocks, strict=True):
            gathered = a[table.long()].transpose(1, 2).flatten(2, 3)
            assert torch.equal(gathered.nan_to_num(0), e.nan_to_num(0))
            before, a = (x[others].view(torch.uint8) for x in (before, a))
            assert torch.equal(a, before)


@both_modules
@pytest.mark.parametrize("block", [-1, 4, 2**31 - 1])
def test_refuses_blocks_that_there_are_not(module, block):
    cache = random_cache(4, 2, 16, 32, 4, torch.device("cpu"))
    table = torch.tensor([[0, 2, 9], [1, block, 9]], dtype=torch.int32)
    tensors = inputs(2, 3, 4, 2, 32)
    options = {"bits": 4, "block_table": table}
    append(module, "cpu", tensors, cache, starts(29, 13), **options)
    with pytest.raises(RuntimeError, match=rf"block_table\[1, 1\] .*between 0 and 3.*{block}"):
        append(module, "cpu", tensors, cache, starts(29, 14), **options)
    with pytest.raises(RuntimeError, match="start.*capacity.*48"):
        append(module, "cpu", tensors, cache, starts(46, 0), **options)
    # Only the block that is written has to be there.
    freed = torch.tensor([[-1, 2**31 - 1, 2], [-1, 1, 9]], dtype=torch.int32)
    table = torch.tensor([[0, 3, 2], [0, 1, 3]], dtype=torch.int32)
    wanted = append(module, "cpu", tensors, cache, starts(40, 29), bits=4, block_table=table)
    got = append(module, "cpu", tensors, cache, starts(40, 29), bits=4, block_table=freed)
    assert torch.equal(wanted[0], got[0])
    assert all(torch.equal(a, b) for a, b in zip(wanted[1], got[1], strict=True))
    with pytest.raises(RuntimeError, match=r"block_table\[0, 1\] .*between 0 and 3"):
        append(module, "cpu", tensors, cache, starts(31, 29), bits=4, block_table=freed)


NAMES = ["q", "k", "v", "cos", "sin"]
NAMES += ["k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero", "start"]


def good(device="cpu"):
    tensors = (*inputs(2, 3, 4, 2, 32), *random_cache(2, 2, 8, 32, 4, "cpu"), starts(0, 1))
    named = zip(NAMES, (t.to(device) for t in tensors), strict=True)
    return {**dict(named), "bits": 4, "size": 32, "k_clip": 0.9, "v_clip": 0.9}


@both_modules
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 32).double()}, "q.*float64"),
        ({"q": torch.zeros(2, 3, 128)}, "q.*head_dim"),
        ({"k": torch.zeros(2, 3, 2, 32).half()}, "k.*float32.*float16"),
        ({"k": torch.zeros(2, 2, 2, 32)}, r"k.*\[2, 3, 2, 32\].*\[2, 2, 2, 32\]"),
        ({"v": torch.zeros(2, 3, 1, 32)}, "v.*shape"),
        ({"cos": torch.zeros(2, 3, 31)}, "cos.*even"),
        ({"cos": torch.zeros(2, 3, 34)}, "cos.*32"),
        ({"cos": torch.zeros(3, 3, 32)}, r"cos must .*\[3, 3, 32\]"),
        ({"cos": torch.zeros(2, 3, 32).int()}, "cos.*int32"),
        ({"sin": torch.zeros(2, 3, 30)}, "sin.*shape"),
        ({"k_codes": torch.zeros(2, 2, 8, 16)}, "k_codes.*uint8"),
        (
            {"k_codes": torch.zeros(2, 2, 8, 32, dtype=torch.uint8)},
            "k_codes must belong .*head_dim 32.*4 bits",
        ),
        ({"k_scale": torch.zeros(2, 2, 8)}, "k_scale.*float16"),
        ({"k_scale": torch.zeros(2, 2, 7).half()}, "k_scale.*shape"),
        ({"k_zero": torch.zeros(2, 2, 8).int()}, "k_zero.*uint8"),
        ({"v_codes": torch.zeros(2, 2, 9, 16, dtype=torch.uint8)}, "v_codes.*shape"),
        ({"v_scale": torch.zeros(2, 8, 2).half().transpose(1, 2)}, "v_scale.*contiguous"),
        ({"v_zero": torch.zeros(2, 2, 8).bool()}, "v_zero.*uint8"),
        ({"start": torch.zeros(2, dtype=torch.int64)}, "start.*int32"),
        ({"start": torch.zeros(1, dtype=torch.int32)}, "start.*shape"),
        ({"bits": 2}, "bits.*2"),
        ({"size": 64}, "size.*64"),
        ({"k_clip": 0.0}, "k_clip"),
        ({"v_clip": 1.1}, "v_clip"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_argument(module, changes, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        module.rope_hadamard_kv_append(**(good() | changes))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_refuses_tensors_that_require_grad(name):
    arguments = good()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match="requires grad"):
        ops.rope_hadamard_kv_append(**arguments)
    with torch.no_grad():
        ops.rope_hadamard_kv_append(**arguments)


def test_opcheck(device):
    arguments = good(device)
    options = [arguments.pop(n) for n in ("bits", "size", "k_clip", "v_clip")]
    torch.library.opcheck(
        torch.ops.quarot.rope_hadamard_kv_append.default,
        (*arguments.values(), options[0], options[1], None, *options[2:], None),
    )
    arguments |= dict(zip(NAMES[5:11], random_cache(4, 2, 16, 32, 4, device), strict=True))
    table = torch.tensor([[2], [0]], dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.quarot.rope_hadamard_kv_append.default,
        (*arguments.values(), options[0], options[1], None, *options[2:], table),
    )


def test_compiles_into_one_graph(device):
    arguments = good(device)
    codes = arguments["k_codes"].clone()

    def step(q):
        return ops.rope_hadamard_kv_append(**(arguments | {"q": q})) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(arguments["q"])
        written = arguments["k_codes"].clone()
        arguments["k_codes"].copy_(codes)
        assert torch.equal(actual, step(arguments["q"]))
    assert torch.equal(written, arguments["k_codes"]) and not torch.equal(written, codes)


# CUDA: streams, graphs, devices

on_cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
CACHE = slice(NAMES.index("k_codes"), NAMES.index("start"))


def needs_kernel(device):
    if ops.kernels()["rope_hadamard_kv_append"][device.type] != "kernel":
        pytest.skip(f"{NO_CUDA}: this build has no rope_hadamard_kv_append kernel")


def result(arguments):
    """Run on a copy of the arguments; returns q and the cache."""
    copies = {n: a.clone() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    return [ops.rope_hadamard_kv_append(**copies), *(copies[n] for n in NAMES[CACHE])]


def assert_all_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), e.cpu())


@on_cuda
@pytest.mark.parametrize("start", [(3, 0), (0, 6), (-1, 0), (-9, 2**31 - 1)])
def test_cuda_leaves_out_what_lies_outside_the_capacity(device, start):
    """The host does not know `start` there: such tokens are not written, the others are."""
    needs_kernel(device)
    tensors = [t.to(device) for t in inputs(2, 2, 2, 2, 32)]
    cache = random_cache(2, 2, 4, 32, 4, device)
    guarded, checks = zip(*(poisoned(t) for t in cache), strict=True)
    ops.rope_hadamard_kv_append(*tensors, *guarded, starts(*start).to(device), bits=4)
    longer = [t.repeat_interleave(3, dim=2) for t in cache]  # 4 positions more on either side
    for long, short in zip(longer, cache, strict=True):
        long[:, :, 4:8] = short
    inside = [min(max(s, -4), 6) + 4 for s in start]
    ops.rope_hadamard_kv_append(*tensors, *longer, starts(*inside).to(device), bits=4)
    for tensor, original, long, check in zip(guarded, cache, longer, checks, strict=True):
        assert torch.equal(tensor, long[:, :, 4:8])
        tensor.copy_(original)
        check()  # only the surroundings are left to differ


@on_cuda
@pytest.mark.parametrize("dim", [32, 80])
def test_cuda_leaves_out_blocks_that_there_are_not(device, dim):
    """The host does not know the table there."""
    needs_kernel(device)
    tensors = [t.to(device) for t in inputs(2, 20, 2, 2, dim)]
    cache = random_cache(3, 2, 16, dim, 4, device)
    guarded, checks = zip(*(poisoned(t) for t in cache), strict=True)
    before = [t.clone() for t in guarded]
    start = starts(3, 0).to(device)
    for table in ([[0, 1], [-1, 3]], [[0, 1], [2**31 - 1, -(2**31)]]):
        table = torch.tensor(table, dtype=torch.int32, device=device)
        ops.rope_hadamard_kv_append(*tensors, *guarded, start, bits=4, block_table=table)
    whole = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    one = [t[:1] for t in tensors]
    ops.rope_hadamard_kv_append(*one, *cache, start[:1], bits=4, block_table=whole)
    for actual, expected in zip(guarded, cache, strict=True):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    for tensor, original, check in zip(guarded, before, checks, strict=True):
        tensor.copy_(original)
        check()  # only the surroundings are left to differ


@on_cuda
def test_runs_on_the_current_stream(device):
    needs_kernel(device)
    arguments = good(device)
    expected = result(arguments | {"k": arguments["k"] * 2})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel on another stream would read k before it is doubled.
        torch.cuda._sleep(10_000_000)
        arguments["k"].mul_(2)
        q = ops.rope_hadamard_kv_append(**arguments)
    stream.synchronize()
    assert_all_equal([q, *(arguments[n] for n in NAMES[CACHE])], expected)


@on_cuda
def test_is_captured_in_a_graph(device):
    """A replay appends at the `start` of its moment."""
    needs_kernel(device)
    arguments = good(device)
    result(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = ops.rope_hadamard_kv_append(**arguments)
    for start in ((0, 4), (3, 5)):
        arguments["start"].copy_(starts(*start))
        arguments["k"].copy_(torch.randn_like(arguments["k"]))
        expected = result(arguments)
        graph.replay()
        assert_all_equal([q, *(arguments[n] for n in NAMES[CACHE])], expected)


@on_cuda
def test_runs_on_a_second_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    arguments = good()
    there, here = (
        {n: a.to(d) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        for d in ("cuda:1", "cuda:0")
    )
    actual = result(there)
    assert actual[0].device.index == 1
    assert_all_equal(actual, result(here))


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "kv_heads", "dim"),
    # Tokens whose heads fill a block's teams, or do not, or need several rounds; few and many.
    [
        (3, 77, 9, 3, 64),
        (2, 50, 32, 8, 128),
        (1, 1, 32, 32, 128),
        (2, 9, 5, 1, 32),
        (1, 33, 4, 4, 256),
    ],
)
def test_head_counts(device, dtype, batch, seq, heads, kv_heads, dim):
    tensors = inputs(batch, seq, heads, kv_heads, dim, dtype=dtype, one_angle=seq % 2 == 0)
    cache = random_cache(batch, kv_heads, seq + 9, dim, 4, torch.device("cpu"))
    start = torch.arange(batch, dtype=torch.int32) * 3
    options = {"bits": 4, "size": dim}
    q, actual = append(ops, device, tensors, cache, start, **options)
    q_expected, expected = append(ops, "cpu", tensors, cache, start, **options)
    assert_accurate(q, q_expected, rotated(tensors[0], *tensors[3:], dim))
    assert_caches_agree(actual, expected, 4)


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_heads(device, dtype):
    """Addresses that are no multiples of 16 bytes take another kernel."""
    tensors = inputs(2, 5, 4, 2, 64, dtype=dtype)
    cache = random_cache(2, 2, 8, 64, 4, torch.device("cpu"))
    odd = [torch.cat((t.flatten()[:1], t.flatten())).to(device)[1:].view(t.shape) for t in tensors]
    options = {"bits": 4, "size": 64}
    q, expected = append(ops, device, tensors, cache, starts(0, 2), **options)
    q_odd, actual = append(ops, device, odd, cache, starts(0, 2), **options)
    torch.testing.assert_close(q_odd, q)
    assert_caches_agree(actual, expected, 4)


@on_cuda
def test_refuses_tensors_on_two_devices(device):
    for name in ("k", "cos", "v_codes", "start"):
        arguments = good(device)
        arguments[name] = arguments[name].cpu()
        with pytest.raises(RuntimeError, match=name):
            ops.rope_hadamard_kv_append(**arguments)
