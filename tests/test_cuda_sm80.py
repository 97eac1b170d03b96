"""linear_int4's kernels of sm_80 to sm_89, on any GPU: tests/cuda, built as sm_80's code."""

from __future__ import annotations

import pytest
import torch

from helpers import NO_CUDA
from test_cpp import ROOT, run, tool

KERNELS = ("linear_int4", "sm90/linear_int4_prefill", "sm90/linear_int4_grouped")


def test_kernels_of_sm_80(tmp_path):
    """s8 and s4 mma of linear_int4: every kernel of its tables, and the largest sums."""
    if not torch.cuda.is_available():
        pytest.skip(f"{NO_CUDA}: no device")
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip(f"{NO_CUDA}: no nvcc")
    major, minor = torch.cuda.get_device_capability()
    sources = [ROOT / "csrc" / "kernels" / "cuda" / f"{name}.cu" for name in KERNELS]
    tests = [ROOT / "tests" / "cuda" / "test_linear_int4.cpp", ROOT / "tests" / "cpp" / "main.cpp"]
    program = tmp_path / "tests"
    run(
        nvcc, "-std=c++20", "-O2", "-Xcompiler", "-ffp-contract=off", "--expt-relaxed-constexpr",
        "--threads", "0",
        "-gencode", f"arch=compute_80,code=sm_{major}{minor}",
        "-I", ROOT / "csrc", "-I", ROOT / "tests" / "cpp", *sources, *tests, "-o", program,
    )  # fmt: skip
    run(program)
