"""Perplexity of a causal LM, and how far its predictions are from a reference model's.

Protocol: every token of a window but the first is predicted from those before it in the window;
perplexity is the exponential of the mean negative log-likelihood over all windows. Softmax and
statistics are fp32 (sums over tokens float64), whatever the model computes in.

One window is in memory at a time: its logits (2048 x 49152 in fp32 are 400 MB), the reference's
beside them, and fp32 temporaries of `_ROWS` rows. Kept per token are two numbers.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

# Rows of logits whose softmax is held in fp32 at once: 50 MB each temporary at a vocabulary of
# 49152, and enough rows that the loop costs nothing.
_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Args:
        perplexity: exp of the mean negative log-likelihood, in nats, of the predicted tokens.
        tokens: number of predicted tokens: windows x (size - 1).
        kld_mean, kld_p99: mean and 99th percentile over the predicted tokens of
            KL(reference || model) in nats; None without a reference.
        top1_agreement: share of predicted tokens where the model's and the reference's most
            likely tokens are the same, in [0, 1]; None without a reference.
        seconds: wall time of the evaluation, the reference included.
    """

    perplexity: float
    tokens: int
    kld_mean: float | None
    kld_p99: float | None
    top1_agreement: float | None
    seconds: float


@torch.inference_mode()
def evaluate(
    model: Any, windows: Tensor, reference: Any | None = None, *, progress: bool = False
) -> Evaluation:
    """Measure a causal LM on token windows, and against a reference model on the same windows.

    Args:
        model: called as `model(input_ids=..., use_cache=False).logits`, `[1, size, vocab]`.
        windows: token ids `[count, size]`, size at least 2; see `data.windows`.
        reference: a second causal LM of the same vocabulary; may be on another device.
        progress: show a bar on stderr.

    Raises:
        ValueError: the windows' shape, or vocabularies of different sizes.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: got shape {list(windows.shape)}, needs [count ≥ 1, size ≥ 2]")
    start = time.perf_counter()
    nll, kld, agree = [], [], []
    for window in tqdm(windows, desc="evaluate", unit="window", disable=not progress):
        logits = _logits(model, window)
        nll.append(_negative_log_likelihood(logits, window))
        if reference is not None:
            distance, same = _distance(_logits(reference, window), logits)
            kld.append(distance)
            agree.append(same)
    seconds = time.perf_counter() - start

    losses = torch.cat(nll)
    distances = torch.cat(kld) if kld else None
    return Evaluation(
        # On a tensor: exp of a hopeless loss is inf, where math.exp would raise.
        perplexity=losses.mean().exp().item(),
        tokens=losses.numel(),
        kld_mean=None if distances is None else distances.mean().item(),
        kld_p99=None if distances is None else _percentile(distances, 0.99),
        top1_agreement=torch.cat(agree).double().mean().item() if agree else None,
        seconds=seconds,
    )


def perplexity(model: Any, windows: Tensor, *, progress: bool = False) -> float:
    """Return the perplexity of a causal LM on token windows `[count, size]`; see `evaluate`."""
    return evaluate(model, windows, progress=progress).perplexity


def _logits(model: Any, window: Tensor) -> Tensor:
    """Return the logits `[size - 1, vocab]` that predict window[1:], in the model's dtype."""
    ids = window.unsqueeze(0).to(model.device)
    return model(input_ids=ids, use_cache=False).logits[0, :-1]


def _negative_log_likelihood(logits: Tensor, window: Tensor) -> Tensor:
    """Return float64 `[size - 1]` on the CPU: -log p(window[i + 1] | window[: i + 1])."""
    losses = []
    targets = window[1:].to(logits.device)
    for rows, target in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        loss = torch.nn.functional.cross_entropy(rows.float(), target, reduction="none")
        losses.append(loss.double().cpu())
    return torch.cat(losses)


def _distance(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(softmax(reference) || softmax(logits)) a row, float64, and equality of argmax."""
    if reference.shape != logits.shape:
        raise ValueError(
            f"reference: got a vocabulary of {reference.shape[-1]}, needs the model's "
            f"{logits.shape[-1]}"
        )
    distances, same = [], []
    for ours, theirs in zip(logits.split(_ROWS), reference.split(_ROWS), strict=True):
        theirs = theirs.to(ours.device)
        log_q = ours.float().log_softmax(-1)
        log_p = theirs.float().log_softmax(-1)
        p = log_p.exp()
        # 0 * log 0 = 0: a reference logit of -inf (a masked token) adds nothing, and no NaN.
        divergence = (p * (log_p - log_q)).masked_fill_(p == 0, 0)
        distances.append(divergence.sum(-1).double().cpu())
        same.append((ours.argmax(-1) == theirs.argmax(-1)).cpu())
    return torch.cat(distances), torch.cat(same)


def _percentile(values: Tensor, share: float) -> float:
    """Return the percentile of `values` [n], linear between neighbours (numpy's default).

    torch.quantile does the same but refuses more than 2^24 values.
    """
    if values.isnan().any():
        return float("nan")
    ordered = values.sort().values
    place = share * (ordered.numel() - 1)
    low = int(place)
    high = min(low + 1, ordered.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], place - low).item()
