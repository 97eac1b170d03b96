"""What several test files share: tiny random models, error metrics, guarded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NO_CUDA = "needs CUDA"
"""In the reason of skips for want of a GPU or its kernel: QUAROT_REQUIRE_CUDA=1 fails those."""


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny random causal LM in eval mode, float32 unless `dtype` is given.

    The defaults have GQA (4 heads on 2), hidden 64 = 2^6, intermediate 96 = 12 * 8, untied
    embeddings. Norm weights and biases are random too, so that a fold that forgets them shows.

    Args:
        family: "llama" or "qwen2" (biases on q, k and v).
        seed: seed of the weights.
        overrides: fields of the transformers config, such as num_attention_heads=3, hidden_size=96,
            num_key_value_heads=3 (MHA), tie_word_embeddings=True, attention_bias=True, head_dim=32;
            and `dtype`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    dtype = overrides.pop("dtype", torch.float32)
    fields: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**fields, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
                elif name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
                else:  # rows of unit length keep every activation, and the logits, near one
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "head_dim": {"head_dim": 32},
    "3-heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
    "9-heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288},
    "36*2^k": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 288,
        "head_dim": 64,
    },
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True},
}
"""The shapes that rotation and conversion must hold for: name -> arguments of `tiny_model`."""


def assert_accurate(actual: Tensor, in_torch: Tensor, exact: Tensor) -> None:
    """Check a float result by CONTRIBUTING.md's rule, against the float64 value `exact`.

    The largest error may be twice that of `in_torch`, the same formula in torch and the same dtype,
    plus one ulp of the largest value.
    """
    assert actual.dtype == in_torch.dtype and actual.shape == exact.shape
    assert exact.dtype == torch.float64 and exact.isfinite().all()
    if exact.numel() == 0:
        return
    error, allowed = ((x.cpu().double() - exact).abs().max() for x in (actual, in_torch))
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= 2 * allowed + ulp, f"error {error:.3g}, torch's {allowed:.3g}, ulp {ulp:.3g}"


def assert_codes_agree(
    actual: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]
) -> None:
    """Check (codes, scale, zero) of an op with a transform, norm or exponential (CONTRIBUTING.md).

    Scales within 4 ulp, of the row's largest where a row has several: the rounding errors before a
    group are those of the row. Codes and zero points differ by at most 1, in 0.1 % of elements.
    """
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            assert a is None and e is None
            continue
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = a.cpu(), e.cpu()
        if e.dtype == torch.float32:
            assert torch.equal(a.isnan(), e.isnan())
            a, e = a.nan_to_num(0), e.nan_to_num(0)
            grouped = expected[0] is not None and e.ndim == expected[0].ndim and e.numel() > 0
            largest = e.amax(-1, keepdim=True) if grouped else e
            ulp = torch.nextafter(largest, largest + 1) - largest
            assert ((a - e).abs() <= 4 * ulp).all(), ((a - e).abs() / ulp).max()
        else:
            apart = (a.long() - e.long()).abs()
            assert (apart <= 1).all()
            assert (apart > 0).sum() <= max(1, 1e-3 * apart.numel())


def poisoned(x: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Copy x into the middle of a larger buffer full of poison (NaN, or 0x7f in integers).

    Returns the copy, contiguous, and a check that neither it nor its surroundings were written. A
    kernel that reads past an end computes with poison.
    """
    margin = 1024
    if x.is_floating_point():
        buffer = x.new_full((x.numel() + 2 * margin,), torch.nan)
    else:
        buffer = x.new_zeros(x.numel() + 2 * margin)
        buffer.view(torch.uint8).fill_(0x7F)
    copy = buffer[margin : margin + x.numel()].view(x.shape)
    copy.copy_(x)
    before = buffer.view(torch.uint8).clone()

    def check() -> None:
        assert torch.equal(buffer.view(torch.uint8), before), "an input or its surroundings changed"

    return copy, check


def strided(x: Tensor) -> Tensor:
    """Return x with rows that are dense but apart: columns of a wider buffer full of NaN."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 24), torch.nan)
    view = wide[..., 8 : 8 + x.shape[-1]]
    return view.copy_(x)


KvCache = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""k_codes, k_scale, k_zero, v_codes, v_scale, v_zero."""


def random_cache(
    batch: int, kv_heads: int, capacity: int, dim: int, bits: int, device: torch.device
) -> KvCache:
    """A KV cache full of random codes, with values of about -1 to 1."""
    shape = (batch, kv_heads, capacity)

    def half() -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(0, 256, (*shape, dim * bits // 8), dtype=torch.uint8)
        scale = ((torch.rand(shape) + 0.5) * 2 / 2**bits).half()
        zero = torch.randint(0, 2**bits, shape).to(torch.uint8)
        return codes.to(device), scale.to(device), zero.to(device)

    return (*half(), *half())


def paged(cache: KvCache, size: int, lengths: Tensor) -> tuple[KvCache, Tensor]:
    """Return a cache, its capacity a multiple of `size`, in blocks of that size, and their table.

    The blocks are in random order, some belong to nobody and hold NaN; entries of the table beyond
    a row's length name blocks that there are not.
    """
    batch, _, capacity = cache[1].shape
    columns, strangers = capacity // size, 3
    held = batch * columns + strangers
    order = torch.randperm(held)[: batch * columns]

    def in_blocks(x: Tensor) -> Tensor:
        cut = x.unflatten(2, (columns, size)).transpose(1, 2).flatten(0, 1)
        blocks = cut.new_full((held, *cut.shape[1:]), 255 if x.dtype == torch.uint8 else torch.nan)
        blocks[order.to(x.device)] = cut
        return blocks

    table = order.view(batch, columns).int().to(lengths.device)
    used = torch.arange(columns, device=lengths.device) * size < lengths[:, None]
    codes, scale, zero, *values = (in_blocks(x) for x in cache)
    return (codes, scale, zero, *values), table.masked_fill(~used, -7)


def cache_values(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Decode one half of a cache in float64, where it is: [batch, kv_heads, capacity, dim]."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return scale.double()[..., None] * (codes.double() - zero.double()[..., None])


def dense_hadamard(size: int) -> Tensor:
    """H of a block of `size`, entries +-1 in float64, by Kronecker products."""
    from quarot import hadamard

    _, factor, power = hadamard.split(size)
    matrix = hadamard.factor_matrix(factor).double()
    for _ in range(power):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix
