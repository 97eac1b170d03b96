"""Draw results/<device>/*.json: hadamard.json, GB/s against n; linear_int4.json, speed against
tokens; model-*.json, the time of a token against the context, the speed-up of prefill, memory;
cpu.json, each case's speed beside its fastest peer's.

Reads the committed results and nothing else, so that the README's figures can be redrawn anywhere.
Needs matplotlib (pip install 'quarot[bench]').

    python benchmarks/plot.py [--format svg|png] [results/<device> ...]
"""

from __future__ import annotations

import argparse
import itertools
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
    plt = pyplot()
    folders = arguments.folders or [path for path in RESULTS.iterdir() if path.is_dir()]
    for folder, (pattern, draw) in itertools.product(sorted(folders), DRAWN.items()):
        for source in sorted(folder.glob(pattern)):
            figure = draw(plt, json.loads(source.read_text("utf-8")))
            if figure is None:
                continue
            target = source.with_suffix(f".{arguments.format}")
            metadata = {"Date": None} if target.suffix == ".svg" else None
            figure.savefig(target, dpi=150, metadata=metadata)
            plt.close(figure)
            print(f"wrote {target}")


def pyplot() -> Any:
    """Return matplotlib.pyplot, set up to draw the same picture from the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quarot"
    from matplotlib import pyplot as plt

    return plt


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


OURS, EAGER, COMPILED = "quarot", "hf eager", "hf compiled"
FORMS = {OURS: ("C0", "o-"), COMPILED: ("C1", "s--"), EAGER: ("C2", "^:")}


def of(report: dict[str, Any], what: str, form: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return (batch, context) -> the cases of a kind that were measured."""
    return {
        (case["batch"], case["context"]): case
        for case in report["cases"]
        if (case["what"], case["form"]) == (what, form) and "skipped" not in case
    }


def draw_model(plt: Any, report: dict[str, Any]) -> Any:
    figure, (decode, prefill, memory) = plt.subplots(
        ncols=3, figsize=(13.5, 4), layout="constrained"
    )
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


# What a case is timed beside without doing its work: bounds.
BOUNDS = {"copy_", "read"}


def draw_cpu(plt: Any, report: dict[str, Any]) -> Any:
    """Draw how many times as fast as the fastest peer each case is."""
    bars = {}
    for case in report["cases"]:
        peers = {name: by for name, by in case["baselines"].items() if name not in BOUNDS}
        if peers:
            name, by = min(peers.items(), key=lambda peer: peer[1])
            bars[f"{case['name']} {case['shape']}, {name}"] = by
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(bars) + 1.2), layout="constrained")
    drawn = axes.barh([*bars], [*bars.values()], color="C0")
    axes.bar_label(drawn, fmt=" %.2f×")
    axes.axvline(1, color="0.6", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("times as fast as the fastest peer (named last)")
    axes.set_title(f"{report['device']}, {report['threads']} threads, {report['date']}")
    return figure


DRAWN = {
    "cpu.json": draw_cpu,
    "hadamard.json": draw_hadamard,
    "linear_int4.json": draw_linear,
    "model-*.json": draw_model,
}

if __name__ == "__main__":
    main()
