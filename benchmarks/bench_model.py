"""Whole models. The small real one in the demo's four forms: accuracy, bytes, tokens a second. On a
GPU, models of known shapes beside transformers' own, eager and compiled: `quarot bench model`.

python -m pytest -s benchmarks/bench_model.py      (make bench runs all)
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from common import DEVICES, write_results
from quarot import bench, shapes


@pytest.mark.parametrize("device", DEVICES)
def test_demo(device: str) -> None:
    command = [sys.executable, "-m", "quarot", "demo", "--device", device, "--json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    report = json.loads(output)
    forms = {form["preset"]: form for form in report.pop("presets")}

    # What the product promises: rotation makes 4-bit activations possible, int4 is a quarter.
    assert forms["W4A4KV4-rtn"]["perplexity"] > 10 * forms["W4A4KV4"]["perplexity"]
    assert forms["W4A8KV4"]["perplexity"] < forms["W4A4KV4"]["perplexity"]
    assert forms["W4A4KV4"]["weight_bytes"] < 0.14 * forms["none"]["weight_bytes"]  # of float32

    for form in forms.values():
        print(
            f"\n{device:4} {form['preset']:12} perplexity {form['perplexity']:9.2f} | "
            f"linears {form['weight_bytes'] / 1e6:6.1f} MB | "
            f"KV {form['kv_bytes_per_token']:7.0f} B/token | "
            f"{form['tokens_per_second']:6.1f} tokens/s",
            end="",
        )
    del report["device"]  # "cpu"; the file names the chip
    print(f"\nwrote {write_results('model', device, list(forms.values()), **report)}")


SECONDS = 80  # for a shape; a case that compiles may begin just before


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs CUDA")
@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("device", ["cuda"])
def test_shape(device: str, shape: str) -> None:
    command = [sys.executable, "-m", "quarot", "bench", "model", "--shape", shape]
    command += ["--device", device, "--seconds", str(SECONDS), "--json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    report = json.loads(output)
    cases = report.pop("cases")
    for index, case in enumerate(cases):
        print(f"\n{bench.line(case, cases[:index])}", end="")
    assert any(case["what"] == "decode" and "ms" in case for case in cases)
    del report["device"]  # "cuda"; the file names the chip
    print(f"\nwrote {write_results(f'model-{shape}', device, cases, **report)}")
