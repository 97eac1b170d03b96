"""What rotation is worth: a model in four forms, measured and asked; `quarot demo` shows it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quarot import eval
from quarot.convert import convert
from quarot.hf import weight_bytes

UNQUANTIZED = "none"
PRESETS = (UNQUANTIZED, "W4A4KV4-rtn", "W4A4KV4", "W4A8KV4")
QUESTION = "What is the capital of France, and what is it famous for?"

log = logging.getLogger("quarot")


def compare(
    reference: Any,
    ids: Tensor,
    ask: Callable[[Any], tuple[str, float]],
    *,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return a row for each of `PRESETS`: quality, sizes, speed and an answer.

    Args:
        reference: an unquantized model; copies of it are converted.
        ids: int64 [windows, tokens] to predict.
        ask: returns a model's answer to a question, and its tokens a second.
    """
    rows = []
    for preset in PRESETS:
        log.info("%s: convert, evaluate, ask", preset)
        form = reference
        if preset != UNQUANTIZED:  # copying takes no time beside loading
            form = convert(copy.deepcopy(reference), preset, seed=seed, progress=progress)
        result = eval.evaluate(form, ids, None if form is reference else reference)
        answer, speed = ask(form)
        row = {
            "preset": preset,
            **dataclasses.asdict(result),
            "weight_bytes": weight_bytes(form),
            "kv_bytes_per_token": _kv_bytes(form, ids[:1]),
            "tokens_per_second": speed,
            "answer": answer,
        }
        rows.append(row)
    return rows


@torch.inference_mode()
def _kv_bytes(model: Any, ids: Tensor) -> float:
    """Return the bytes of KV cache a token, measured on the cache of `ids` [1, tokens]."""
    cache = model(input_ids=ids.to(model.device), use_cache=True).past_key_values
    # Rank 3 and 4: keys, values, codes, scales, zeros, all [batch, kv_heads, capacity(, …)].
    buffers = [
        value
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, Tensor) and value.dim() >= 3
    ]
    return sum(buffer.nbytes / buffer.shape[2] for buffer in buffers)


def show(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print `compare`'s rows as a table and as answers, and what they are about."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))  # narrow: 80 columns hold it
    table.add_column("preset", no_wrap=True)
    for heading in ("perplexity", "KL", "top-1", "linears MB", "KV B/token", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        compared = row["kld_mean"] is not None
        table.add_row(
            _form(row),
            f"{row['perplexity']:.2f}",
            f"{row['kld_mean']:.3f}" if compared else "-",
            f"{row['top1_agreement']:.1%}" if compared else "-",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['kv_bytes_per_token']:.0f}",
            f"{row['tokens_per_second']:.1f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{about['model']}, seed {about['seed']}, {about['windows']} windows of {about['window']} "
        f"tokens of pydoc_data.topics (sha256 {about['text_sha256'][:12]}), on {about['device']} "
        f"({about['cpu_isa']}, {about['threads']} threads), {about['seconds']:.0f} s in all. KL "
        "(nats) and top-1 (how often the most likely token is the same) are against the "
        "unquantized model; linears are the decoder layers', as stored; tok/s is of the answer "
        "below, prompt included."
    )
    console.print(f"\n[bold]{about['question']}[/bold]")
    for row in rows:
        console.print(f"\n[bold]{_form(row)}[/bold]")
        console.print(row["answer"], markup=False)


def _form(row: dict[str, Any]) -> str:
    return "unquantized" if row["preset"] == UNQUANTIZED else row["preset"]
