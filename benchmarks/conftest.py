"""Benchmarks are pytest functions that take `report`: what a module reports becomes its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common import DEVICES, Case, write_results


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Case], None]]:
    """Take (device, case): print its line now, write results/<device>/<family>.json at the end.

    Only a run of all the module's cases on a device is written: part of one (-k, or a failure)
    would overwrite the whole. -k cuda and -k cpu are whole runs.
    """
    cases: dict[str, list[dict[str, Any]]] = {}
    failed_before = request.session.testsfailed

    def add(device: str, case: Case) -> None:
        print(f"\n{device:4} {case.name:12} {case.line()}", end="", flush=True)
        cases.setdefault(device, []).append(dataclasses.asdict(case))

    yield add
    part = request.config.option.keyword not in ("", *DEVICES)
    if part or request.session.testsfailed > failed_before:
        return
    family = request.module.__name__.removeprefix("bench_")
    for device, rows in cases.items():
        print(f"\nwrote {write_results(family, device, rows)}")
