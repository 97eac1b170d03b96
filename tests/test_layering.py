"""The folder tree is the dependency diagram: a lower tier never includes or imports an upper one.

`violations_*` read sources and return one line a breach; the tests run them over the tree, and over
small wrong trees to show that they see what they should.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Python: module or package -> what it may import from quarot. "x" allows the module or package x
# and everything in it, "" everything.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "config": (),
    "hadamard": (),
    "data": (),
    "ops": ("ops", "config", "hadamard", "_C"),
    "quantize": ("quantize", "config", "ops"),
    "models": ("models", "config"),
    "modules": ("modules", "cache", "config", "hadamard", "ops", "quantize.grid", "models.base"),
    "cache": ("modules", "config", "hadamard", "ops", "quantize.grid", "models.base"),
    "rotate": ("config", "hadamard", "models.base"),
    "generate": ("cache",),
    "graph": ("models", "modules", "cache", "generate"),
    "hf": ("config", "models", "modules", "cache", "ops", "graph"),
    "convert": (
        "config", "hadamard", "data", "ops", "quantize", "models", "modules", "cache", "rotate",
        "hf",
    ),
    "shapes": ("config", "models", "modules", "hf", "convert"),
    "bench": ("models", "modules", "cache", "generate", "shapes"),
    "eval": ("data",),
    "demo": ("convert", "eval", "hf"),
    "cli": ("",),
    "__main__": ("cli",),
    "__init__": (
        "config", "hadamard", "data", "ops", "quantize", "models", "modules", "cache", "rotate",
        "generate", "hf", "convert", "eval", "_C",
    ),
}  # fmt: skip

# An architecture's description names no other one: only the registry knows them all.
DESCRIPTIONS_MAY_IMPORT = ("config", "models.base")

# Third parties that these may not import: arithmetic and descriptions know no model library.
NO_TRANSFORMERS = ("config", "hadamard", "data", "ops", "quantize", "models", "rotate", "eval")
NO_TORCH = ("config", "models")


def covers(allowed: str, module: str) -> bool:
    """Whether permission to import `allowed` is one to import `module`."""
    return allowed == "" or module == allowed or module.startswith(allowed + ".")


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything the file imports, at any depth.

    `from a import b` yields a.b, which names b whether it is a module or an attribute.
    """
    here = ("quarot", *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def violations_python(package: Path) -> list[str]:
    """Return what the modules of a quarot package import against the table."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        tier, name = parts[0], ".".join(parts)
        if tier not in MAY_IMPORT:
            found.append(f"{name}: a module that the table does not know")
            continue
        allowed = MAY_IMPORT[tier]
        if tier == "models" and parts[1] not in ("__init__", "base"):
            allowed = DESCRIPTIONS_MAY_IMPORT
        for line, target in imports(path, package):
            if target == "quarot" or target.startswith("quarot."):
                inner = target.removeprefix("quarot").removeprefix(".")
                if inner == "__version__":
                    continue
                # "quarot" alone is the package's __init__, which imports all tiers but the CLI.
                if not any(covers(a, inner) for a in allowed):
                    found.append(f"{name}:{line} imports {target}")
            elif covers("transformers", target) and tier in NO_TRANSFORMERS:
                found.append(f"{name}:{line} imports {target}")
            elif covers("torch", target) and tier in NO_TORCH:
                found.append(f"{name}:{line} imports {target}")
    return found


# C++: what a tier may include. Quoted names are files of csrc, as paths from csrc.
TIERS: dict[str, tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]] = {
    # tier: (its files, what it may include of csrc, what of the system)
    "kernels interface": (
        re.compile(r"kernels/[^/]+"),
        re.compile(r"kernels/[^/]+\.h"),
        re.compile(r"[a-z0-9_]+"),
    ),
    "kernels cpu": (
        re.compile(r"kernels/cpu/.+"),
        re.compile(r"kernels/[^/]+\.h|kernels/cpu/.+"),
        # The processor, and the kernel's word that its tiles may be used.
        re.compile(r"[a-z0-9_]+|immintrin\.h|cpuid\.h|sys/syscall\.h|unistd\.h"),
    ),
    "kernels cuda": (
        re.compile(r"kernels/cuda/.+"),
        re.compile(r"kernels/[^/]+\.h|kernels/cuda/.+"),
        re.compile(r"[a-z0-9_]+|cuda[a-z0-9_]*\.h|cuda/.+|mma\.h|cooperative_groups(/.+)?\.h"),
    ),
    "ops": (
        re.compile(r"ops/.+"),
        re.compile(r"kernels/[^/]+\.h|kernels/cpu/isa\.h|ops/.+"),
        # The stable ABI only (and its C shims): ATen and c10 tie a build to one torch version.
        re.compile(
            r"[a-z0-9_]+|pybind11/.+|torch/csrc/stable/.+|torch/headeronly/.+"
            r"|torch/csrc/inductor/aoti_torch/c/.+"
        ),
    ),
}

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)


def violations_cpp(csrc: Path) -> list[str]:
    """Return what the files of a csrc tree include against `TIERS`."""
    found = []
    sources = {p for p in csrc.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}}
    for path in sorted(sources):
        name = path.relative_to(csrc).as_posix()
        tier = next((rules for rules in TIERS.values() if rules[0].fullmatch(name)), None)
        if tier is None:
            found.append(f"{name}: a file outside the tiers {', '.join(TIERS)}")
            continue
        _, files, system = tier
        for quote, header in _INCLUDE.findall(path.read_text("utf-8")):
            if quote == "<":
                allowed = system.fullmatch(header) is not None
            else:
                beside, from_root = path.parent / header, csrc / header
                target = beside if beside.is_file() else from_root
                inside = target.is_file() and target.resolve().is_relative_to(csrc.resolve())
                allowed = inside and bool(
                    files.fullmatch(target.resolve().relative_to(csrc.resolve()).as_posix())
                )
            if not allowed:
                found.append(f"{name} includes {header}")
    return found


def test_python_imports() -> None:
    assert violations_python(ROOT / "python" / "quarot") == []


def test_cpp_includes() -> None:
    csrc = ROOT / "csrc"
    assert {p.parent.name for p in csrc.rglob("*.h")} >= {"kernels", "ops"}, "nothing to check"
    assert violations_cpp(csrc) == []


def test_module_cpp_has_no_torch_header() -> None:
    """pybind11 and torch in one translation unit would tie `_C` to torch's pybind11."""
    headers = [h for _, h in _INCLUDE.findall((ROOT / "csrc/ops/module.cpp").read_text("utf-8"))]
    assert any(h.startswith("pybind11/") for h in headers)
    assert not [h for h in headers if h.startswith("torch/")]


def test_only_module_cpp_knows_pybind11() -> None:
    others = [p for p in (ROOT / "csrc").rglob("*.*") if p.name != "module.cpp"]
    assert not [p.name for p in others if "pybind11/" in p.read_text("utf-8")]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


@pytest.mark.parametrize(
    ("name", "source", "breach"),
    [
        ("config.py", "import quarot.ops", "quarot.ops"),
        ("config.py", "import quarot", "quarot"),
        ("config.py", "from quarot import ops", "quarot.ops"),
        ("hadamard.py", "from . import config", "quarot.config"),
        ("ops/reference.py", "from ..modules import linear", "quarot.modules.linear"),
        ("ops/__init__.py", "def f():\n    from transformers import Cache", "transformers.Cache"),
        ("quantize/rtn.py", "from quarot.models import base", "quarot.models.base"),
        ("models/qwen.py", "from quarot.models.llama import LLAMA", "quarot.models.llama.LLAMA"),
        ("models/qwen.py", "import torch.nn", "torch.nn"),
        ("modules/linear.py", "from quarot.models import registry", "quarot.models.registry"),
        ("modules/linear.py", "from quarot.quantize import rtn", "quarot.quantize.rtn"),
        ("rotate.py", "from quarot import ops", "quarot.ops"),
        ("hf.py", "from quarot.convert import convert", "quarot.convert.convert"),
        ("convert.py", "import quarot.cli", "quarot.cli"),
        ("eval.py", "from quarot.config import QuarotConfig", "quarot.config.QuarotConfig"),
        ("cache.py", "from quarot import rotate as r", "quarot.rotate"),
    ],
)  # fmt: skip
def test_python_violation_is_seen(tmp_path: Path, name: str, source: str, breach: str) -> None:
    found = violations_python(write(tmp_path, {name: source}))
    assert len(found) == 1 and found[0].endswith(f" imports {breach}")


def test_unknown_module_is_seen(tmp_path: Path) -> None:
    found = violations_python(write(tmp_path, {"utils.py": ""}))
    assert found == ["utils: a module that the table does not know"]


def test_lawful_python_is_lawful(tmp_path: Path) -> None:
    files = {
        "ops/reference.py": "import torch\nfrom quarot import hadamard\nfrom . import pack",
        "modules/linear.py": "import transformers\nfrom quarot.models.base import Geometry",
        "models/llama.py": "from quarot.models.base import Architecture\nimport dataclasses",
        "cli.py": "import quarot\nfrom quarot import convert, __version__",
        "hf.py": "from quarot import __version__",
    }
    assert violations_python(write(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/cpu/x.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("kernels/cuda/x.cu", "#  include <ATen/ATen.h>"),
        ("kernels/x.h", "#include <pybind11/pybind11.h>"),
        ("kernels/x.h", "#include <cuda_runtime.h>"),
        ("kernels/x.h", '#include "kernels/cpu/vec.h"'),
        ("kernels/x.h", '#include "cpu/vec.h"'),
        ("kernels/cpu/x.cpp", '#include "ops/checks.h"'),
        ("kernels/cpu/x.cpp", '#include "../../ops/checks.h"'),
        ("kernels/cpu/x.cpp", '#include "kernels/cuda/ptx.cuh"'),
        ("kernels/cuda/x.cu", '#include "kernels/cpu/vec.h"'),
        ("kernels/cpu/x.cpp", '#include "nowhere.h"'),
        ("ops/x.cpp", "#include <ATen/ATen.h>"),
        ("ops/x.cpp", "#include <torch/extension.h>"),
        ("ops/x.cpp", '#include "kernels/cpu/vec.h"'),
        ("helpers/x.h", ""),
    ],
)
def test_cpp_violation_is_seen(tmp_path: Path, name: str, source: str) -> None:
    tree = {
        "kernels/types.h": "#include <cstdint>",
        "kernels/cpu/vec.h": '#include "kernels/types.h"\n#include <immintrin.h>',
        "kernels/cuda/ptx.cuh": "#include <cuda_bf16.h>",
        "ops/checks.h": '#include "kernels/types.h"\n#include <torch/csrc/stable/tensor.h>',
    }
    assert violations_cpp(write(tmp_path, tree)) == [], "the tree itself is lawful"
    assert len(violations_cpp(write(tmp_path, {name: source}))) == 1
