"""Draw results/<device>/*.json: hadamard.json, GB/s against n, of ops.hadamard, its peer, a copy;
model-*.json, the time of a token against the context, the speed-up of prefill, and memory.

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
    for folder in sorted(arguments.folders or RESULTS.iterdir()):
        for pattern, draw in (("hadamard.json", draw_hadamard), ("model-*.json", draw_model)):
            for source in sorted(folder.glob(pattern)):
                target = source.with_suffix(f".{arguments.format}")
                draw(json.loads(source.read_text("utf-8")), target)
                print(f"wrote {target}")


def new_figure(columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes, one or a row of `columns`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quarot"  # the same picture from the same numbers
    from matplotlib import pyplot

    width = 8 if columns == 1 else 4.5 * columns
    return pyplot.subplots(ncols=columns, figsize=(width, 4), layout="constrained")


def save(figure: Any, target: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


def points(cases: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the (n, GB/s) of a curve, ascending, where it was measured."""
    found = []
    for case in cases:
        try:
            found.append((case["sizes"]["n"], CURVES[name][0](case)))
        except KeyError:  # this peer was not there, or has no such size
            continue
    return sorted(found)


def draw_hadamard(report: dict[str, Any], target: Path) -> None:
    cases = [
        case
        for case in report["cases"]
        if not case["sizes"]["few"] and case["shape"].endswith(DTYPE)
    ]
    figure, axes = new_figure(1)
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
    save(figure, target)


OURS, EAGER, COMPILED = "quarot", "hf eager", "hf compiled"
FORMS = {OURS: ("C0", "o-"), COMPILED: ("C1", "s--"), EAGER: ("C2", "^:")}


def of(report: dict[str, Any], what: str, form: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return (batch, context) -> the cases of a kind that were measured."""
    return {
        (case["batch"], case["context"]): case
        for case in report["cases"]
        if (case["what"], case["form"]) == (what, form) and "skipped" not in case
    }


def draw_model(report: dict[str, Any], target: Path) -> None:
    figure, (decode, prefill, memory) = new_figure(3)
    steps = {form: of(report, "decode", form) for form in FORMS}
    contexts = sorted({context for cases in steps.values() for _, context in cases})
    for form, (colour, style) in FORMS.items():
        for batch, alpha in ((1, 1.0), (16, 0.5)):
            curve = [
                (context, case["ms"])
                for (rows, context), case in sorted(steps[form].items())
                if rows == batch
            ]
            if curve:
                label = f"{form}, batch {batch}"
                decode.plot(
                    *zip(*curve, strict=True), style, color=colour, alpha=alpha, label=label
                )
    decode.set_xscale("log", base=2)
    decode.set_yscale("log")
    decode.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    decode.set_xlabel("context, tokens")
    decode.set_ylabel("ms a decode step")
    decode.margins(y=0.35)  # room for the legend
    decode.legend(frameon=False, fontsize="small", ncols=2, loc="upper center")

    ours, peer = of(report, "prefill", OURS), of(report, "prefill", EAGER)
    both = sorted(ours.keys() & peer.keys())
    bars = prefill.bar(
        [f"{batch} x {context}" for batch, context in both],
        [peer[case]["ms"] / ours[case]["ms"] for case in both],
        color="C0",
        width=0.5,
    )
    prefill.bar_label(bars, fmt="%.2f×")
    prefill.axhline(1, color="0.6")
    prefill.set_ylabel(f"prefill, times as fast as {EAGER}")

    forms = {"quarot": OURS, "bfloat16": EAGER}
    held = {
        name: case for name, form in forms.items() for case in of(report, "memory", form).values()
    }
    weights = [case["weight_bytes"] / 1e9 for case in held.values()]
    cache = [case["kv_bytes"] / 1e9 for case in held.values()]
    memory.bar([*held], weights, color="C0", width=0.5, label="weights")
    memory.bar([*held], cache, bottom=weights, color="C1", width=0.5, label="KV cache")
    for place, total in enumerate(map(sum, zip(weights, cache, strict=True))):
        memory.text(place, total, f"{total:.2f}", ha="center", va="bottom")
    memory.set_ylabel("GB, one sequence of 8192 tokens")
    memory.legend(frameon=False, fontsize="small")

    title = f"{report['shape']}, {report['preset']}, {report['device']}, {report['date']}"
    figure.suptitle(title)
    for axes in (decode, prefill, memory):
        axes.grid(alpha=0.3, axis="y")
    save(figure, target)


if __name__ == "__main__":
    main()
