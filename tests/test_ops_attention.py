"""ops.attention: accuracy against float64, causality, masks, windows, pages, hidden garbage.

Head dimensions 64, 96, 128, 256 and few queries: the CUDA kernel. Others, or more than 32 queries:
torch's attention on tiles of the dequantized cache there.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from helpers import (
    NO_CUDA,
    KvCache,
    assert_accurate,
    cache_values,
    paged,
    poisoned,
    random_cache,
)
from quarot import ops
from quarot.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_modules = pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
CPU = torch.device("cpu")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def in_float64(q, cache: KvCache, lengths, mask, bits, scale, window=None):
    """The formula, one query at a time, over the keys that it sees."""
    keys, values = (cache_values(*(x.cpu() for x in half), bits) for half in (cache[:3], cache[3:]))
    batch, seq, heads, _ = q.shape
    group = heads // keys.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for s in range(seq):
            for h in range(heads):
                last = int(lengths[b]) - seq + s
                seen = list(range(max(0, last + 1 - (window or last + 1)), last + 1))
                if mask is not None:
                    row = mask[b, h if mask.shape[1] > 1 else 0, s]
                    seen = [j for j in seen if row[j]]
                if seen:
                    scores = keys[b, h // group][seen] @ q[b, s, h].double() * scale
                    out[b, s, h] = scores.softmax(0) @ values[b, h // group][seen]
    return out


def seen_keys(shape, keys, lengths, mask, window=None):
    """Return bool [B, 1 or H, S, keys]: what each query sees; shape is q's."""
    tokens = lengths[:, None] - shape[1] + torch.arange(shape[1], device=lengths.device)
    key = torch.arange(keys, device=lengths.device)
    seen = key <= tokens[..., None]
    if window is not None:
        seen &= key > tokens[..., None] - window
    seen = seen[:, None]
    return seen if mask is None else seen & mask[..., :keys]


def all_at_once(q, cache: KvCache, lengths, bits, scale, mask=None, window=None):
    """The same for all queries together, on q's device, fast enough for many keys."""
    group = q.shape[2] // cache[0].shape[1]
    keys, values = (
        cache_values(*(x.to(q.device) for x in half), bits).repeat_interleave(group, 1)
        for half in (cache[:3], cache[3:])
    )
    scores = torch.einsum("bshd,bhjd->bhsj", q.double(), keys) * scale
    seen = seen_keys(q.shape, keys.shape[2], lengths, mask, window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhsj,bhjd->bshd", weights, values).cpu()


def torch_attention(q, cache: KvCache, lengths, bits, scale, mask=None, window=None):
    """torch's own attention in q's dtype, on the cache dequantized to it."""
    group = q.shape[2] // cache[0].shape[1]
    keys, values = (
        cache_values(*(x.to(q.device) for x in half), bits).to(q.dtype).repeat_interleave(group, 1)
        for half in (cache[:3], cache[3:])
    )
    seen = seen_keys(q.shape, keys.shape[2], lengths, mask, window).expand(-1, q.shape[2], -1, -1)
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=seen, scale=scale
    )
    return out.masked_fill(~seen.any(-1, keepdim=True), 0).transpose(1, 2)


def attend(module, device, q, cache, lengths, mask=None, *, bits, scale=0.2, **options):
    mask = None if mask is None else mask.to(device)
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    return module.attention(
        q.to(device),
        *(t.to(device) for t in cache),
        lengths.to(device),
        mask,
        bits=bits,
        scale=scale,
        **options,
    )


def assert_close_to(exact, device, q, cache, lengths, *, bits, scale):
    """Compare with float64, by the error of torch in q's dtype: the same formula in float32 and one
    rounding, or on CUDA its own attention."""
    actual = attend(ops, device, q, cache, lengths, bits=bits, scale=scale)
    assert actual.dtype == q.dtype and actual.is_contiguous()
    roundings = 2
    if device.type == "cpu":
        in_torch = attend(reference, device, q, cache, lengths, bits=bits, scale=scale)
    else:
        in_torch = torch_attention(q.to(device), cache, lengths.to(device), bits, scale)
        roundings = 16  # of keys, values and weights too
    assert_accurate(actual, in_torch, exact)
    # Neither may be far off: the rule above would pass if both were.
    limit = roundings * torch.finfo(q.dtype).eps * exact.abs().max().item() + 2e-5
    torch.testing.assert_close(in_torch.cpu().double(), exact, rtol=0, atol=limit)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 4, 64), (9, 3, 64), (8, 1, 32), (3, 3, 80), (2, 2, 96), (16, 1, 128), (2, 1, 256)],
)
@pytest.mark.parametrize("seq", [1, 6])
def test_accuracy(device, bits, dtype, heads, kv_heads, dim, seq):
    # Many rows: the largest error of few would be a matter of luck.
    q = torch.randn(16, seq, heads, dim).to(dtype)
    cache = random_cache(16, kv_heads, 40, dim, bits, CPU)
    lengths = torch.arange(25, 41, dtype=torch.int32)
    exact = all_at_once(q, cache, lengths, bits, dim**-0.5)
    assert_close_to(exact, device, q, cache, lengths, bits=bits, scale=dim**-0.5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("seq", "heads", "kv_heads", "dim"),
    [(512, 9, 3, 64), (300, 4, 2, 128), (70, 3, 3, 80), (40, 2, 1, 256), (33, 4, 4, 8)],
)
def test_accuracy_of_prompts(device, seq, heads, kv_heads, dim, bits):
    """Against torch's own attention: on a CPU with tiles ours rounds as much, else less."""
    q = torch.randn(2, seq, heads, dim).to(torch.bfloat16)
    cache = random_cache(2, kv_heads, seq, dim, bits, CPU)
    lengths = ints(seq, seq)
    exact = all_at_once(q, cache, lengths, bits, dim**-0.5)
    in_torch = torch_attention(q.to(device), cache, lengths.to(device), bits, dim**-0.5)
    actual = attend(ops, device, q, cache, lengths, bits=bits, scale=dim**-0.5, length=seq)
    assert_accurate(actual, in_torch, exact)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    seq=st.integers(1, 7),
    group=st.integers(1, 3),
    masked=st.sampled_from([None, "shared", "per head"]),
    window=st.none() | st.integers(1, 21),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 100),
)
def test_shapes_masks_and_lengths(device, lengths, seq, group, masked, window, bits, seed):
    torch.manual_seed(seed)
    batch, heads = len(lengths), 2 * group
    q = torch.randn(batch, seq, heads, 64)
    cache = random_cache(batch, 2, 20, 64, bits, CPU)
    mask = None
    if masked:
        width = max(lengths) + seed % (21 - max(lengths))
        mask = torch.rand(batch, heads if masked == "per head" else 1, seq, width) < 0.6
    exact = in_float64(q, cache, ints(*lengths), mask, bits, 0.2, window)
    for module in (ops, reference):
        actual = attend(module, device, q, cache, ints(*lengths), mask, bits=bits, window=window)
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=0, atol=1e-5)
    if mask is None and min(lengths) >= seq:
        fast = all_at_once(q, cache, ints(*lengths), bits, 0.2, window=window)
        torch.testing.assert_close(fast, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seq", [1, 300])
def test_long_rows(device, seq):
    q = torch.randn(1, seq, 2, 64)
    cache = random_cache(1, 1, 3000, 64, 4, CPU)
    exact = all_at_once(q, cache, ints(2900), 4, 0.125)
    assert_close_to(exact, device, q, cache, ints(2900), bits=4, scale=0.125)


def test_large_scores_do_not_overflow(device):
    q = torch.randn(1, 3, 2, 64) * 1e4
    cache = random_cache(1, 2, 9, 64, 4, CPU)
    actual = attend(ops, device, q, cache, ints(9), bits=4, scale=1.0)
    exact = in_float64(q, cache, ints(9), None, 4, 1.0)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=0, atol=1e-2)


def test_prefill_equals_decode_steps(device):
    """Query s of a prefill sees what it would see as a step of its own."""
    q = torch.randn(2, 5, 4, 64)
    cache = random_cache(2, 2, 16, 64, 4, CPU)
    whole = attend(ops, device, q, cache, ints(9, 12), bits=4)
    for s in range(5):
        step = attend(ops, device, q[:, s : s + 1], cache, ints(5 + s, 8 + s), bits=4)
        torch.testing.assert_close(whole[:, s : s + 1], step, rtol=1e-5, atol=1e-6)


def test_queries_without_keys_are_zero(device):
    q = torch.randn(3, 4, 2, 64)
    cache = random_cache(3, 1, 8, 64, 4, CPU)
    mask = torch.ones(3, 1, 4, 8, dtype=torch.bool)
    mask[1, :, 2] = False  # fully masked
    mask[2, :, :, :3] = False  # left padding: the first queries see nothing
    lengths = ints(2, 8, 4)  # two tokens and four queries: the first two precede every key
    actual = attend(ops, device, q, cache, lengths, mask, bits=4).cpu()
    empty = torch.zeros(3, 4, dtype=torch.bool)
    empty[0, :2] = empty[1, 2] = empty[2, :3] = True
    assert not actual[empty].any()
    assert actual[~empty].isfinite().all() and actual[~empty].abs().amax(-1).gt(0).all()


@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_lies_beyond_the_length_is_never_used(device, seq, bits):
    q = torch.randn(2, seq, 4, 64)
    cache = random_cache(2, 2, 24, 64, bits, CPU)
    lengths = ints(7, 17)
    expected = attend(ops, device, q, cache, lengths, bits=bits)
    for scale in (cache[1], cache[4]):
        scale[0, :, 7:], scale[1, :, 17:] = torch.nan, torch.inf
    assert torch.equal(attend(ops, device, q, cache, lengths, bits=bits), expected)
    for length, row in ((7, 0), (17, 1)):  # nor what another row of the batch brings
        alone = [t[row : row + 1] for t in cache]
        actual = attend(ops, device, q[row : row + 1], alone, ints(length), bits=bits)
        torch.testing.assert_close(actual, expected[row : row + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [None, 40], ids=["unknown length", "known length"])
@pytest.mark.parametrize("how", ["causal", "mask", "window"])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("seq", [6, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [1, 4], ids=["key", "value"])
def test_a_nan_reaches_the_queries_that_see_it(device, part, dtype, seq, dim, how, length):
    q = torch.randn(1, seq, 2, dim).to(dtype)
    cache = random_cache(1, 2, 40, dim, 4, CPU)
    options = {"bits": 4, "length": length, "window": 9 if how == "window" else None}
    mask = torch.rand(1, 1, seq, 40) < 0.6 if how == "mask" else None
    if mask is not None:
        mask[..., 37] = torch.arange(seq) % 2 == 0
    expected = attend(ops, device, q, cache, ints(40), mask, **options)
    cache[part][0, 1, 37] = torch.nan  # a token whose key or value was not finite, of head 1
    actual = attend(ops, device, q, cache, ints(40), mask, **options)
    hit = seen_keys(q.shape, 40, ints(40), mask, options["window"])[0, 0, :, 37].to(device)
    assert hit.any() and not hit.all()
    assert actual[0, hit, 1].isnan().all()
    assert torch.equal(actual[0, ~hit], expected[0, ~hit])
    assert torch.equal(actual[0, :, 0], expected[0, :, 0])


@pytest.mark.parametrize("seq", [1, 6, 40])
@pytest.mark.parametrize("window", [1, 16, 100])
def test_keys_before_the_window_have_no_influence(device, seq, window):
    q = torch.randn(2, seq, 4, 64)
    cache = random_cache(2, 2, 700, 64, 4, CPU)
    lengths = ints(700, 450)
    expected = attend(ops, device, q, cache, lengths, bits=4, window=window)
    exact = all_at_once(q, cache, lengths, 4, 0.2, window=window)
    torch.testing.assert_close(expected.cpu().double(), exact, rtol=0, atol=1e-5)
    for scale in (cache[1], cache[4]):
        for b, length in enumerate(lengths):
            scale[b, :, : max(int(length) - seq + 1 - window, 0)] = torch.nan
    assert torch.equal(attend(ops, device, q, cache, lengths, bits=4, window=window), expected)


# Paged caches


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "dim"),
    [(reference, 80), *((ops, dim) for dim in (64, 80, 96, 128, 256))],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
@pytest.mark.parametrize("seq", [1, 6, 40])
def test_a_paged_cache_equals_one_that_is_not(module, device, seq, dim, dtype, bits):
    lengths, capacity = ints(331, 97, 0), 336
    q = torch.randn(3, seq, 4, dim).to(dtype)
    cache = random_cache(3, 2, capacity, dim, bits, CPU)
    mask = torch.rand(3, 1, seq, capacity) < 0.7
    for size in (16, 48, 336):
        blocks, table = paged(cache, size, lengths)
        for options in ({}, {"mask": mask}, {"window": 50}):
            expected = attend(module, device, q, cache, lengths, bits=bits, **options)
            options = options | {"bits": bits, "block_table": table}
            assert torch.equal(attend(module, device, q, blocks, lengths, **options), expected)


def test_rows_may_share_blocks(device):
    q = torch.randn(2, 1, 4, 64)
    q[1] = q[0]
    cache = random_cache(5, 2, 32, 64, 4, CPU)
    table = torch.tensor([[3, 0], [3, 0]], dtype=torch.int32)
    out = attend(ops, device, q, cache, ints(40, 40), bits=4, block_table=table)
    assert torch.equal(out[0], out[1])


@both_modules
@pytest.mark.parametrize("block", [-1, 4, 2**31 - 1])
def test_refuses_blocks_that_there_are_not(module, block):
    cache = random_cache(4, 2, 16, 64, 4, CPU)
    table = torch.tensor([[0, 2, 9], [1, block, 9]], dtype=torch.int32)
    q = torch.randn(2, 1, 4, 64)
    attend(module, CPU, q, cache, ints(32, 16), bits=4, block_table=table)
    with pytest.raises(RuntimeError, match=rf"block_table\[1, 1\] .*between 0 and 3.*{block}"):
        attend(module, CPU, q, cache, ints(32, 17), bits=4, block_table=table)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("seq", "window"), [(1, 16), (1, 17), (6, 43), (40, 9), (1, 100)])
@pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
def test_blocks_before_every_window_may_be_gone(module, device, seq, window, dim, bits):
    lengths, size = ints(48, 331, 0, 200), 16
    q = torch.randn(4, seq, 4, dim)
    blocks, table = paged(random_cache(4, 2, 336, dim, bits, CPU), size, lengths)
    # Block 0, which may stand in for those that are gone, belongs to nobody and holds NaN.
    blocks = tuple(torch.cat((x[:1], x)) for x in blocks)
    blocks[1][0] = blocks[4][0] = torch.nan
    table = torch.where(table < 0, table, table + 1)
    options = {"bits": bits, "window": window}
    expected = attend(module, device, q, blocks, lengths, **options, block_table=table)
    assert expected.isfinite().all()
    first = (lengths - seq + 1 - window).clamp(min=0)
    freed = table.clone()
    for b, block in enumerate((first // size).tolist()):
        freed[b, :block] = torch.tensor([-1, 2**31 - 1, len(blocks[0])])[torch.arange(block) % 3]
    got = attend(module, device, q, blocks, lengths, **options, block_table=freed)
    assert torch.equal(got, expected)
    if device.type == "cpu" and first[1] >= size:
        freed[1, first[1] // size] = -1
        with pytest.raises(RuntimeError, match=rf"block_table\[1, {first[1] // size}\]"):
            attend(module, device, q, blocks, lengths, **options, block_table=freed)


@both_modules
@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        (torch.zeros(2, 3), 16, "block_table.*int32"),
        (torch.zeros(2, 3, dtype=torch.int64), 16, "block_table.*int32"),
        (torch.zeros(3, 3, dtype=torch.int32), 16, r"block_table.*\[2"),
        (torch.zeros(6, dtype=torch.int32), 16, r"block_table.*\[2"),
        (torch.zeros(2, 3, dtype=torch.int32), 24, "k_codes.*multiple of 16"),
        (torch.zeros(2, 0, dtype=torch.int32), 16, r"lengths\[0\].*capacity 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refuses_other_tables(module, table, size, message):
    cache = random_cache(4, 2, size, 64, 4, CPU)
    with pytest.raises(RuntimeError, match=message):
        attend(module, CPU, torch.randn(2, 1, 4, 64), cache, ints(5, 9), bits=4, block_table=table)


def test_masked_keys_have_no_influence(device):
    q = torch.randn(1, 2, 2, 64)
    cache = random_cache(1, 1, 10, 64, 4, CPU)
    mask = torch.ones(1, 1, 2, 10, dtype=torch.bool)
    mask[..., 4:6] = False
    expected = attend(ops, device, q, cache, ints(10), mask, bits=4)
    for t in cache:
        t[:, :, 4:6] = t[:, :, :2]
    assert torch.equal(attend(ops, device, q, cache, ints(10), mask, bits=4), expected)


def test_layouts(device):
    cache = random_cache(2, 2, 12, 64, 4, CPU)
    lengths = ints(12, 10)
    q = torch.randn(2, 3, 4, 64)
    mask = torch.rand(2, 4, 3, 12) < 0.7
    expected = attend(ops, device, q, cache, lengths, mask, bits=4)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(ops, device, heads_first, cache, lengths, mask, bits=4), expected)
    wide = torch.zeros(2, 4, 3, 20, dtype=torch.bool)
    wide[..., 4:16] = mask
    here = [t.to(device) for t in (q, *cache, lengths)]
    for view in (wide.to(device)[..., 4:16], mask.to(device).mT.contiguous().mT):
        assert torch.equal(ops.attention(*here, view, bits=4, scale=0.2), expected)
    shared = mask[:, :1]
    expected = attend(ops, device, q, cache, lengths, shared.repeat(1, 4, 1, 1), bits=4)
    expanded = shared.to(device).expand(2, 4, 3, 12)
    assert torch.equal(ops.attention(*here, expanded, bits=4, scale=0.2), expected)
    assert torch.equal(ops.attention(*here, shared.to(device), bits=4, scale=0.2), expected)


@pytest.mark.parametrize("seq", [1, 3])
def test_reads_and_writes_only_its_own(device, seq):
    q, cache = torch.randn(2, seq, 4, 40), random_cache(2, 2, 9, 40, 4, CPU)
    mask = torch.ones(2, 1, seq, 9, dtype=torch.bool)
    inputs = [q, *cache, ints(9, 9), mask]
    guarded, checks = zip(*(poisoned(t.to(device)) for t in inputs), strict=True)
    actual = ops.attention(*guarded, bits=4, scale=0.2)
    exact = in_float64(q, cache, ints(9, 9), None, 4, 0.2)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=0, atol=1e-5)
    for check_ in checks:
        check_()


@pytest.mark.parametrize("shape", [(0, 1, 4, 64), (2, 0, 4, 64)])
def test_empty(device, shape):
    cache = random_cache(shape[0], 2, 4, 64, 4, CPU)
    lengths = torch.full(shape[:1], 2, dtype=torch.int32)
    actual = attend(ops, device, torch.empty(shape), cache, lengths, bits=4)
    assert actual.shape == shape


NAMES = ["q", "k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero", "lengths"]


def good(device="cpu"):
    tensors = (torch.randn(2, 3, 4, 64), *random_cache(2, 2, 8, 64, 4, CPU), ints(8, 5))
    named = zip(NAMES, (t.to(device) for t in tensors), strict=True)
    options = {"mask": None, "bits": 4, "scale": 0.2, "length": None, "window": None}
    return {**dict(named), **options, "block_table": None}


def booleans(*shape):
    return torch.ones(shape, dtype=torch.bool)


@both_modules
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 64).double()}, "q.*float64"),
        ({"q": torch.zeros(2, 3, 128)}, "q.*head_dim"),
        ({"q": torch.zeros(2, 3, 3, 64)}, "q.*heads"),
        ({"q": torch.zeros(2, 3, 4, 32)}, "k_codes.*32"),
        ({"q": torch.zeros(1, 3, 4, 64)}, "k_codes.*1 seq"),
        ({"k_codes": torch.zeros(2, 2, 8, 16)}, "k_codes.*uint8"),
        ({"k_scale": torch.zeros(2, 2, 8)}, "k_scale.*float16"),
        ({"k_zero": torch.zeros(2, 2, 8).char()}, "k_zero.*uint8"),
        ({"v_codes": torch.zeros(2, 2, 9, 32).byte()}, "v_codes.*shape"),
        ({"v_codes": torch.zeros(2, 8, 2, 32).byte().mT.mT.transpose(1, 2)}, "v_codes.*contiguous"),
        ({"v_scale": torch.zeros(2, 2, 7).half()}, "v_scale.*shape"),
        ({"v_zero": torch.zeros(2, 2, 8)}, "v_zero.*uint8"),
        ({"lengths": torch.tensor([8, 5])}, "lengths.*int32"),
        ({"lengths": ints(8)}, "lengths.*shape"),
        ({"lengths": ints(8, 9)}, "lengths.*capacity 8.*9"),
        ({"lengths": ints(8, -1)}, "lengths.*-1"),
        ({"mask": torch.zeros(2, 1, 3, 8)}, "mask.*bool"),
        ({"mask": booleans(2, 3, 8)}, "mask"),
        ({"mask": booleans(2, 2, 3, 8)}, "mask.*1 or 4"),
        ({"mask": booleans(1, 1, 3, 8)}, "mask"),
        ({"mask": booleans(2, 1, 3, 7)}, "mask.*at least 8"),
        ({"bits": 16}, "bits.*16"),
        ({"window": 0}, "window .*at least 1.*0"),
        ({"length": 9}, "length .*capacity 8.*9"),
        ({"length": 8}, r"length .*lengths\[1\] = 5.*8"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_argument(module, changes, message):
    with pytest.raises(RuntimeError, match=message):
        module.attention(**(good() | changes))


def test_refuses_a_query_that_requires_grad(device):
    arguments = good(device)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"attention: .*requires grad"):
        ops.attention(**arguments)
    with torch.no_grad():
        ops.attention(**arguments)


def test_opcheck(device):
    op = torch.ops.quarot.attention.default
    arguments = good(device)
    torch.library.opcheck(op, tuple(arguments.values()))
    mask = booleans(2, 1, 3, 8).to(device)
    torch.library.opcheck(op, tuple((arguments | {"mask": mask, "window": 3}).values()))
    blocks, table = paged(random_cache(2, 2, 32, 64, 4, device), 16, arguments["lengths"])
    arguments |= dict(zip(NAMES[1:7], blocks, strict=True)) | {"block_table": table}
    torch.library.opcheck(op, tuple(arguments.values()))


def test_compiles_into_one_graph(device):
    arguments = good(device)

    def step(q):
        return ops.attention(**(arguments | {"q": q * 2})) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(arguments["q"]), step(arguments["q"]))


# ---- CUDA only ----------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
CUDA = torch.device("cuda")


def on_gpu(batch, seq, heads, kv_heads, dim, capacity, bits, dtype=torch.bfloat16):
    q = torch.randn(batch, seq, heads, dim, device=CUDA).to(dtype)
    return q, random_cache(batch, kv_heads, capacity, dim, bits, CUDA)


def random_mask(kind, batch, heads, seq, keys):
    if kind is None:
        return None
    mask = torch.rand(batch, heads if kind == "per head" else 1, seq, keys, device=CUDA) < 0.7
    mask[0, :, 0] = False  # a query that sees nothing
    return mask


CASES = [
    # heads, kv_heads, dim, bits, dtype, mask
    (32, 8, 128, 4, torch.bfloat16, None),
    (8, 8, 128, 4, torch.float16, "shared"),
    (16, 2, 64, 4, torch.bfloat16, "per head"),
    (6, 2, 64, 8, torch.float16, None),
    (12, 4, 96, 4, torch.float16, None),
    (4, 4, 96, 8, torch.bfloat16, "shared"),
    (8, 2, 128, 8, torch.bfloat16, None),
    (4, 2, 256, 4, torch.bfloat16, None),
    (8, 1, 256, 8, torch.float16, "shared"),
    (8, 2, 128, 4, torch.float32, "per head"),
    (4, 1, 256, 4, torch.float32, None),
]


@on_cuda
@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5, 8, 9, 33, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "bits", "dtype", "masked"), CASES)
def test_cuda_accuracy(seq, heads, kv_heads, dim, bits, dtype, masked):
    """Ragged rows, some shorter than the queries, and one that is empty; several splits."""
    capacity = 1500 + seq  # not a multiple of anything
    q, cache = on_gpu(5, seq, heads, kv_heads, dim, capacity, bits, dtype)
    lengths = ints(capacity, 700, 0, 2, 64).to(CUDA)
    mask = random_mask(masked, 5, heads, seq, capacity)
    actual = ops.attention(q, *cache, lengths, mask, bits=bits, scale=dim**-0.5)
    exact = all_at_once(q, cache, lengths, bits, dim**-0.5, mask)
    in_torch = torch_attention(q, cache, lengths, bits, dim**-0.5, mask)
    assert_accurate(actual, in_torch, exact)
    seen = seen_keys(q.shape, capacity, lengths, mask).any(-1).expand(-1, heads, -1)
    assert not actual.transpose(1, 2)[~seen].any()
    again = ops.attention(q, *cache, lengths, mask, bits=bits, scale=dim**-0.5)
    assert torch.equal(actual, again)


@on_cuda
@pytest.mark.parametrize("capacity", [70, 2100, 20000])
@pytest.mark.parametrize("seq", [1, 3, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "bits", "dtype", "masked"), CASES)
def test_cuda_one_sequence(heads, kv_heads, dim, bits, dtype, masked, seq, capacity):
    """Any text in a cache of any size; what lies beyond it has no effect; and the length is written
    just before."""
    q, cache = on_gpu(1, seq, heads, kv_heads, dim, capacity, bits, dtype)
    mask = random_mask(masked, 1, heads, seq, capacity)
    lengths = ints(capacity).to(CUDA)
    settings = {"bits": bits, "scale": dim**-0.5}
    for length in sorted({capacity, capacity - 1, capacity // 3, 65, 2, 0}, reverse=True):
        for scale in (cache[1], cache[4]):
            scale[:, :, length:] = torch.nan
        lengths.fill_(length)
        actual = ops.attention(q, *cache, lengths, mask, **settings)
        kept = [torch.nan_to_num(part) if part.is_floating_point() else part for part in cache]
        exact = all_at_once(q, kept, lengths, bits, dim**-0.5, mask)
        in_torch = torch_attention(q, kept, lengths, bits, dim**-0.5, mask)
        assert_accurate(actual, in_torch, exact)
        seen = seen_keys(q.shape, capacity, lengths, mask).any(-1).expand(-1, heads, -1)
        assert not actual.transpose(1, 2)[~seen].any()


@on_cuda
@pytest.mark.parametrize("capacity", [64, 640, 2048])
@pytest.mark.parametrize("seq", [1, 4, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_whole_rows(seq, capacity, dtype):
    """All rows of one length that the host knows: no mask is written, whether or not the queries
    are the only tokens."""
    q, cache = on_gpu(2, seq, 8, 2, 128, capacity, 4, dtype)
    lengths = torch.full((2,), min(capacity, 1000), dtype=torch.int32, device=CUDA)
    for length in (lengths, torch.full_like(lengths, seq)):
        known = int(length[0])
        actual = ops.attention(q, *cache, length, bits=4, scale=0.1, length=known)
        unknown = ops.attention(q, *cache, length, bits=4, scale=0.1)
        exact = all_at_once(q, cache, length, 4, 0.1)
        in_torch = torch_attention(q, cache, length, 4, 0.1)
        assert_accurate(actual, in_torch, exact)
        assert_accurate(unknown, in_torch, exact)


@on_cuda
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("window", [1, 100, 1000])
@pytest.mark.parametrize("seq", [1, 4, 40, 700])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "bits", "dtype", "masked"), CASES[::2])
def test_cuda_window(heads, kv_heads, dim, bits, dtype, masked, seq, window, known):
    """Ragged rows, and prefill that takes some of its queries at a time."""
    q, cache = on_gpu(3, seq, heads, kv_heads, dim, 1500, bits, dtype)
    lengths = (ints(1400, 1400, 1400) if known else ints(1500, 900, 3)).to(CUDA)
    mask = random_mask(masked, 3, heads, seq, 1500)
    options = {"bits": bits, "scale": dim**-0.5, "window": window}
    actual = ops.attention(q, *cache, lengths, mask, **options, length=1400 if known else None)
    exact = all_at_once(q, cache, lengths, bits, dim**-0.5, mask, window)
    in_torch = torch_attention(q, cache, lengths, bits, dim**-0.5, mask, window)
    assert_accurate(actual, in_torch, exact)


@on_cuda
@pytest.mark.parametrize("seq", [1, 40])
def test_cuda_keys_in_no_block_are_nan(seq):
    """The host does not know the table there; and what a window leaves out is not asked for."""
    q, cache = on_gpu(2, seq, 8, 2, 128, 640, 4)
    lengths = ints(600, 500).to(CUDA)
    blocks, table = paged(cache, 64, lengths)
    options = {"bits": 4, "scale": 0.1, "block_table": table}
    expected = ops.attention(q, *blocks, lengths, window=100, **options)
    table[1, 1], table[0, 0] = -1, blocks[0].shape[0]
    assert ops.attention(q, *blocks, lengths, **options).isnan().all()
    assert torch.equal(ops.attention(q, *blocks, lengths, window=100, **options), expected)


@on_cuda
@pytest.mark.parametrize("dim", [128, 256])  # a tile is a sequence, or some heads of one
def test_cuda_prefill_in_tiles(dim):
    q, cache = on_gpu(2, 40, 16, 8, dim, 40000, 4)
    lengths = ints(40000, 39000).to(CUDA)
    actual = ops.attention(q, *cache, lengths, bits=4, scale=dim**-0.5)
    for b, h in itertools.product(range(2), range(8)):
        one = [t[b : b + 1, h : h + 1] for t in cache]
        queries = q[b : b + 1, :, 2 * h : 2 * h + 2]
        exact = all_at_once(queries, one, lengths[b : b + 1], 4, dim**-0.5)
        in_torch = torch_attention(queries, one, lengths[b : b + 1], 4, dim**-0.5)
        assert_accurate(actual[b : b + 1, :, 2 * h : 2 * h + 2], in_torch, exact)


@on_cuda
def test_cuda_long_context():
    q, cache = on_gpu(1, 1, 8, 2, 128, 131072, 4)
    lengths = ints(131072).to(CUDA)
    actual = ops.attention(q, *cache, lengths, bits=4, scale=0.1)
    exact = all_at_once(q, cache, lengths, 4, 0.1)
    assert_accurate(actual, torch_attention(q, cache, lengths, 4, 0.1), exact)


@on_cuda
def test_cuda_wide_range_of_scales():
    """A weight is rounded to fp16, whatever the scale of its value is."""
    q, cache = on_gpu(1, 1, 8, 2, 128, 500, 4)
    k_scale, v_scale = cache[1], cache[4]
    v_scale[0, 0, 5], v_scale[0, 0, 9], v_scale[0, 1] = 60000, 2**-14, 2**-14
    k_scale[0, 0, 9] = 3
    lengths = ints(500).to(CUDA)
    actual = ops.attention(q, *cache, lengths, bits=4, scale=0.1)
    exact = all_at_once(q, cache, lengths, 4, 0.1)
    in_torch = torch_attention(q, cache, lengths, 4, 0.1)
    for heads in (slice(4), slice(4, 8)):
        assert_accurate(actual[:, :, heads], in_torch[:, :, heads], exact[:, :, heads])


@on_cuda
@pytest.mark.parametrize("seq", [1, 4, 40])
@pytest.mark.parametrize("masked", [None, "shared"])
def test_cuda_graph_follows_the_lengths(seq, masked):
    q, cache = on_gpu(3, seq, 8, 2, 128, 700, 4)
    lengths = ints(700, 300, 20).to(CUDA)
    mask = random_mask(masked, 3, 8, seq, 700)
    settings = {"bits": 4, "scale": 0.1}
    ops.attention(q, *cache, lengths, mask, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = ops.attention(q, *cache, lengths, mask, **settings)
    for now in ((700, 300, 20), (21, 0, 699), (128, 129, 127)):
        lengths.copy_(ints(*now))
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(actual, ops.attention(q, *cache, lengths, mask, **settings))


@on_cuda
@pytest.mark.parametrize("seq", [1, 40])
def test_cuda_runs_on_the_current_stream(seq):
    q, cache = on_gpu(2, seq, 8, 2, 128, 700, 4)
    lengths = ints(700, 300).to(CUDA)
    expected = ops.attention(q, *cache, lengths, bits=4, scale=0.1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the default stream would be done long before
        late = q * 1
        actual = ops.attention(late, *cache, lengths, bits=4, scale=0.1)
    stream.synchronize()
    assert torch.equal(actual, expected)


@on_cuda
@pytest.mark.parametrize("offset", [1, 8])
def test_cuda_alignment(offset):
    """Queries may start anywhere; codes must not."""
    q, cache = on_gpu(1, 1, 8, 2, 128, 128, 4)
    lengths = ints(100).to(CUDA)
    expected = ops.attention(q, *cache, lengths, bits=4, scale=0.1)

    def moved(x):
        return torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(x.shape)

    grids = [moved(x) if x.ndim == 3 else x for x in cache]
    assert torch.equal(ops.attention(moved(q), *grids, lengths, bits=4, scale=0.1), expected)
    with pytest.raises(RuntimeError, match=r"v_codes .*16 bytes"):
        ops.attention(q, *cache[:3], moved(cache[3]), *cache[4:], lengths, bits=4, scale=0.1)
