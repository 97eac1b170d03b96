"""Draw results/<device>/*.json: hadamard, GB/s against n; linear_int4, speed against tokens.

Reads the committed results and nothing else, so that the README's figures can be redrawn anywhere.
Needs matplotlib (pip install 'quarot[bench]').

    python benchmarks/plot.py [--format svg|png] [results/<device> ...]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
DTYPE = "bfloat16"

# name -> (a case's GB/s, colour, marker). A case has its own GB/s, and the others' times by its.
CURVES: dict[str, tuple[Any, str, str]] = {
    "copy": (lambda case: case["gbps"] / case["copy_share"], "0.6", ""),
    "quarot": (lambda case: case["gbps"], "C0", "o"),
    "fast_hadamard_transform": (lambda case: case["gbps"] / case["baselines"]["dao"], "C1", "s"),
    "torch": (lambda case: case["gbps"] / case["baselines"]["torch"], "C2", "^"),
}


# Of a linear layer: output and input channels of the matrices, and name -> (baseline, colour,
# marker); a case has its time's ratio to each baseline.
LINEAR_SHAPES = [(4096, 4096), (5120, 13824), (28672, 4096), (8192, 28672)]
LINEAR_CURVES: dict[str, tuple[str | None, str, str]] = {
    "quarot": (None, "C0", "o"),
    "fp8": ("fp8", "C1", "s"),
    "int8": ("int8", "C2", "^"),
    "W4A16": ("W4A16", "C3", "v"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: all of results/")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    arguments = parser.parse_args()
    folders = arguments.folders or [path for path in RESULTS.iterdir() if path.is_dir()]
    for folder, (family, draw) in itertools.product(sorted(folders), DRAWN.items()):
        source = folder / f"{family}.json"
        if not source.exists():
            continue
        report = json.loads(source.read_text("utf-8"))
        target = source.with_suffix(f".{arguments.format}")
        with pyplot() as plt:
            if (figure := draw(plt, report)) is None:
                continue
            metadata = {"Date": None} if target.suffix == ".svg" else None
            figure.savefig(target, dpi=150, metadata=metadata)
            plt.close(figure)
        print(f"wrote {target}")


@contextlib.contextmanager
def pyplot() -> Iterator[Any]:
    """Yield matplotlib.pyplot, set up to draw the same picture from the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quarot"
    from matplotlib import pyplot as plt

    yield plt


def points(cases: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the (n, GB/s) of a curve, ascending, where it was measured."""
    found = []
    for case in cases:
        try:
            found.append((case["sizes"]["n"], CURVES[name][0](case)))
        except KeyError:  # this peer was not there, or has no such size
            continue
    return sorted(found)


def draw_hadamard(plt: Any, report: dict[str, Any]) -> Any:
    cases = [
        case
        for case in report["cases"]
        if not case["sizes"]["few"] and case["shape"].endswith(DTYPE)
    ]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, (_, colour, marker) in CURVES.items():
        if curve := points(cases, name):
            axes.plot(*zip(*curve, strict=True), marker=marker, color=colour, label=name)
    powers = [n for n, _ in points(cases, "quarot") if n & (n - 1) == 0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(powers, [str(n) for n in powers])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("n, entries of a row")
    axes.set_ylabel("GB/s, read and written once")
    axes.set_title(f"Hadamard transform, {DTYPE}, {report['device']}, {report['date']}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_linear(plt: Any, report: dict[str, Any]) -> Any:
    """Draw, for some matrices, times as fast as bf16 against the number of tokens."""
    shapes: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for case in report["cases"]:
        if "bf16" in case["baselines"] and case.get("sizes"):
            shapes.setdefault((case["sizes"]["n"], case["sizes"]["k"]), []).append(case)
    drawn = [shape for shape in LINEAR_SHAPES if shape in shapes]
    if not drawn:
        return None
    figure, panels = plt.subplots(
        1,
        len(drawn),
        figsize=(3 * len(drawn), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (n, k) in zip(panels[0], drawn, strict=True):
        cases = sorted(shapes[n, k], key=lambda case: case["sizes"]["m"])
        for name, (peer, colour, marker) in LINEAR_CURVES.items():
            curve = [
                (case["sizes"]["m"], case["baselines"]["bf16"] / case["baselines"].get(peer, 1))
                for case in cases
                if peer is None or peer in case["baselines"]
            ]
            if curve:
                axes.plot(*zip(*curve, strict=True), marker=marker, color=colour, label=name)
        axes.axhline(1, color="0.6", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(f"{n} x {k}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("times as fast as bf16")
    panels[0][0].set_ylim(bottom=0)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside right center")
    figure.suptitle(f"linear_int4, {report['device']}, {report['date']}")
    return figure


DRAWN = {"hadamard": draw_hadamard, "linear_int4": draw_linear}

if __name__ == "__main__":
    main()
