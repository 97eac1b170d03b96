"""The torch-free tier on its own: tests/cpp, built with AddressSanitizer and UBSan, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cpp-asan"


def run(*command: str | Path, **kwargs: object) -> None:
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **kwargs,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, f"{command[0]} failed:\n{result.stdout[-8000:]}"


def tool(name: str) -> str | None:
    """The program, from this environment if it has one, else from PATH."""
    return shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )


def test_kernels_under_sanitizers() -> None:
    """All tests of tests/cpp pass, and no access, overflow or conversion is undefined."""
    cmake = tool("cmake")
    if cmake is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs cmake and a C++ compiler")
    ninja = tool("ninja")
    run(
        cmake, "-S", ROOT, "-B", BUILD, "-DQUAROT_EXTENSION=OFF", "-DQUAROT_CUDA=OFF",
        "-DQUAROT_CPP_TESTS=ON", "-DQUAROT_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug",
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    )  # fmt: skip
    run(cmake, "--build", BUILD, "-j", str(min(os.cpu_count() or 1, 8)))
    # detect_leaks needs ptrace, which containers often forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("QUAROT_CPU_ISA", None)
    run(BUILD / "tests" / "cpp" / "quarot_cpp_tests", env=environment)
