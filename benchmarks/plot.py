"""Draw results/<device>/hadamard.json: GB/s against n, of ops.hadamard, its peer and a copy.

Reads the committed results and nothing else, so that the README's figures can be redrawn anywhere.
Needs matplotlib (pip install 'quarot[bench]').

    python benchmarks/plot.py [--format svg|png] [results/<device> ...]
"""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: all of results/")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    arguments = parser.parse_args()
    sources = [f / "hadamard.json" for f in arguments.folders] or RESULTS.glob("*/hadamard.json")
    for source in sorted(sources):
        report = json.loads(source.read_text("utf-8"))
        target = source.with_suffix(f".{arguments.format}")
        draw(report, target)
        print(f"wrote {target}")


def points(cases: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the (n, GB/s) of a curve, ascending, where it was measured."""
    found = []
    for case in cases:
        try:
            found.append((case["sizes"]["n"], CURVES[name][0](case)))
        except KeyError:  # this peer was not there, or has no such size
            continue
    return sorted(found)


def draw(report: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quarot"  # the same picture from the same numbers
    from matplotlib import pyplot

    cases = [
        case
        for case in report["cases"]
        if not case["sizes"]["few"] and case["shape"].endswith(DTYPE)
    ]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
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
    figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
