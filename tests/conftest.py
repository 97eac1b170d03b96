"""Devices, seeds and hypothesis settings of all tests.

A machine without a GPU skips the CUDA cases visibly; QUAROT_REQUIRE_CUDA=1 makes such a skip, and
no other, a failure.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import hypothesis
import pytest
import torch

from helpers import NO_CUDA

# No deadlines (a shared machine stalls), no random failures of unrelated changes.
hypothesis.settings.register_profile(
    "quarot",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("quarot")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    required = os.environ.get("QUAROT_REQUIRE_CUDA") == "1"
    if required and report.skipped and NO_CUDA in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped under QUAROT_REQUIRE_CUDA=1: {report.longrepr}"
    return report


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device type that kernels are written for."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{NO_CUDA}: no device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
