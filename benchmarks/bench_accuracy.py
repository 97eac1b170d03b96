"""Perplexity of the small real model: unquantized, unrotated, and rotated over several seeds.

The README's first table is this benchmark's JSON. The project ships no corpus, so the text is named
by an environment variable; the published numbers are of WikiText-2's test split (its SHA-256 stands
in the JSON).

    QUAROT_TEXT=wikitext2-test.txt python -m pytest -s benchmarks/bench_accuracy.py
"""

from __future__ import annotations

import copy
import os

import pytest

import quarot
from common import DEVICES, write_results
from quarot import data, eval, hf

WINDOW, WINDOWS = 2048, 4
# Three seeds where 4-bit activations are at work: the random signs alone move them by some percent.
RUNS = [
    ("none", 0),
    ("W4A4KV4-rtn", 0),
    *((p, s) for p in ("W4A4KV4", "W4A8KV4") for s in range(3)),
]


@pytest.mark.skipif("QUAROT_TEXT" not in os.environ, reason="QUAROT_TEXT names no text file")
@pytest.mark.parametrize("device", DEVICES)
def test_perplexity(device: str) -> None:
    text = data.read_text(os.environ["QUAROT_TEXT"])
    model, tokenizer = quarot.load_model("smollm2", device=device)
    windows = data.windows(data.tokenize(tokenizer, text), WINDOW, WINDOWS)
    cases = []
    for preset, seed in RUNS:
        form = copy.deepcopy(model)
        if preset != "none":
            quarot.convert(form, preset, seed=seed, progress=False)
        result = eval.evaluate(form, windows)
        cases.append(
            {
                "preset": preset,
                "seed": seed,
                "perplexity": result.perplexity,
                "weight_bytes": hf.weight_bytes(form),
                "seconds": result.seconds,
            }
        )
        print(f"\n{device:4} {preset:12} seed {seed}: perplexity {result.perplexity:.2f}", end="")

    # Rotation is what makes 4-bit activations possible.
    perplexity = {(case["preset"], case["seed"]): case["perplexity"] for case in cases}
    assert perplexity["W4A4KV4-rtn", 0] > 20 * max(perplexity["W4A4KV4", s] for s in range(3))
    path = write_results(
        "accuracy",
        device,
        cases,
        model="smollm2",
        dtype=str(model.dtype),
        text_sha256=data.sha256(text),
        window=WINDOW,
        windows=WINDOWS,
    )
    print(f"\nwrote {path}")
