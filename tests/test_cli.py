"""cli.py: what a person types and what a script reads, on a tiny model with a byte tokenizer."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import quarot
from helpers import tiny_model
from quarot import bench, cli, data, demo, eval, shapes

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Any:
    """A tokenizer of the 256 bytes, with beginning, end and padding after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny unquantized model and its tokenizer, saved."""
    path = tmp_path_factory.mktemp("tiny model")  # with a space in its name
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.eos_token_id = None  # a random model would end anywhere
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 20, "utf-8")
    return str(path)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def command(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def only_json(out: str) -> dict[str, Any]:
    assert out.count("\n") == 1
    assert out.endswith("\n")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


SIZES = ("--window", "32", "--windows", "3")


def test_eval_is_the_protocol(run: Run, folder: str, text: str) -> None:
    code, out, _ = run("eval", folder, "--text", text, *SIZES, "--preset", "none", "--json")
    assert code == 0
    report = only_json(out)
    model, tokenizer = quarot.load_model(folder)
    content = data.read_text(text)
    windows = data.windows(data.tokenize(tokenizer, content), 32, 3)
    assert report.pop("seconds") > 0
    assert report == {
        "model": folder,
        "preset": "none",
        "seed": 0,
        "perplexity": eval.perplexity(model, windows),
        "tokens": 3 * 31,
        "kld_mean": None,
        "kld_p99": None,
        "top1_agreement": None,
        "weight_bytes": 2 * 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96),
        "text_sha256": data.sha256(content),
    }


def test_eval_against_itself(run: Run, folder: str, text: str) -> None:
    code, out, _ = run("eval", folder, "--text", text, *SIZES, "--reference", folder, "--json")
    report = only_json(out)
    assert code == 0
    assert report["kld_mean"] == pytest.approx(0, abs=1e-6)
    assert report["top1_agreement"] == 1.0


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that a CPU can measure, and little of it."""
    sizes = {
        "vocab_size": 200,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setitem(shapes.SHAPES, "llama-3-8b", sizes)
    for name, value in {
        "PROMPT": 32,
        "MEMORY_CONTEXT": 300,
        "ROOM": 24,
        "FEW": 2,
        "MANY": 8,
    }.items():
        monkeypatch.setattr(bench, name, value)
    for name in ("WARM", "GROUPS", "STEPS"):
        monkeypatch.setattr(bench, name, 2)
    cases = ((1, 32), (2, 200_000))
    monkeypatch.setattr(bench, "QUICK_CASES", cases)


def test_bench_model(run: Run, small_bench: None) -> None:
    code, out, _ = run("bench", "model", "--device", "cpu", "--quick", "--json")
    assert code == 0
    report = only_json(out)
    assert (report["shape"], report["preset"]) == ("llama-3-8b", "W4A4KV4")
    for form in (bench.OURS, bench.EAGER):
        cases = [case for case in report["cases"] if case["form"] == form]
        (memory,) = (case for case in cases if case["what"] == "memory")
        weights = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)  # of two layers
        rest = 2 * (2 * 200 * 128 + 5 * 128)  # embedding, head and norms in 16 bits
        scales = 4 * 2 * (128 + 64 + 64 + 128 + 256 + 256 + 128)
        frequencies = 4 * 2 * 16
        held = weights // 2 + scales if form == bench.OURS else weights * 2
        assert memory["weight_bytes"] == held + rest + frequencies
        entry = 16 + 3 if form == bench.OURS else 64
        assert memory["kv_bytes"] == pytest.approx(2 * 2 * 2 * 300 * entry, abs=64)
        prompts = [case for case in cases if case["what"] == "prefill"]
        assert [(case["batch"], "skipped" in case) for case in prompts] == [(1, False), (16, True)]
        steps = [case for case in cases if case["what"] == "decode"]
        assert steps[0]["ms"] > 0
        assert steps[1]["skipped"] == "the model has 131072 positions"


def test_bench_model_prints_lines(run: Run, small_bench: None) -> None:
    options = ("--device", "cpu", "--quick", "--parts", "decode,memory")
    code, out, _ = run("bench", "model", *options)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 6
    assert "weights 0.000 GB" in lines[0] and "skipped: the model has" in lines[2]
    assert "x quarot's decode" in lines[4]


def test_bench_model_refuses(run: Run) -> None:
    for options, named in (
        (("--parts", "decode,speed"), "speed"),
        (("--shape", "llama-9"), "llama-9"),
        (("--preset", "none", "--device", "cpu"), "--preset"),
    ):
        code, out, err = run("bench", "model", *options)
        assert code == 2 and not out and named in err


def test_checkpoint_equals_conversion_in_memory(
    run: Run, folder: str, text: str, tmp_path: Path
) -> None:
    out_folder = tmp_path / "new" / "W4A4KV4 out"
    options = ("--preset", "W4A4KV4", "--seed", "3")
    code, out, _ = run("convert", folder, str(out_folder), *options)
    assert code == 0
    assert "W4A4KV4, seed 3" in out
    assert [p.name for p in out_folder.parent.iterdir()] == [out_folder.name], (
        "nothing is left over"
    )
    assert (out_folder / "tokenizer.json").is_file()
    measure = ("--text", text, *SIZES, "--reference", folder, "--json")
    stored = only_json(run("eval", str(out_folder), *measure)[1])
    memory = only_json(run("eval", folder, *options, *measure)[1])
    for volatile in ("model", "seconds"):
        stored.pop(volatile), memory.pop(volatile)
    assert stored == memory
    assert (stored["preset"], stored["seed"]) == ("W4A4KV4", 3)
    assert stored["kld_mean"] > 0
    # Codes: half a byte a weight; scales: 4 bytes an output channel.
    channels = 64 + 32 + 32 + 64 + 96 + 96 + 64
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert stored["weight_bytes"] == 2 * (weights // 2 + 4 * channels)


def test_eval_prints_for_people(run: Run, folder: str, text: str) -> None:
    code, out, _ = run("eval", folder, "--text", text, *SIZES)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["tokens"] == "93"
    assert lines["kld_mean"] == "-"
    assert float(lines["perplexity"]) > 1


def test_convert_into_an_empty_folder(run: Run, folder: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, _ = run("convert", folder, str(tmp_path / "out"), "--preset", "W4A16KV16-rtn")
    assert code == 0
    assert quarot.load(tmp_path / "out").config.quantization_config.preset == "W4A16KV16-rtn"


def test_convert_refuses_to_overwrite(run: Run, folder: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    code, out, err = run("convert", folder, str(tmp_path))
    assert (code, out) == (2, "")
    assert "is not empty, needs a new or an empty folder" in err
    code, _, err = run("convert", folder, str(tmp_path / "mine.txt"))
    assert code == 2
    assert "is a file" in err
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("failure", [RuntimeError("disk\non fire"), KeyboardInterrupt()])
def test_failed_convert_leaves_nothing(
    run: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1, "the folder being written is beside OUT"
        raise failure

    monkeypatch.setattr(cli, "convert_model", fail)
    code, out, err = run("convert", folder, str(tmp_path / "out"))
    expected = (1, "disk on fire") if isinstance(failure, RuntimeError) else (130, "interrupted")
    assert (code, out) == (expected[0], "")
    assert err.splitlines()[-1] == f"quarot: error: {expected[1]}"
    assert list(tmp_path.iterdir()) == []


def test_generate_greedy_is_the_models_own(run: Run, folder: str) -> None:
    options = ("--prompt", "Hello", "--max-new-tokens", "8")
    code, out, _ = run("generate", folder, *options)
    assert code == 0
    model, tokenizer = quarot.load_model(folder)

    def expected(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True) + "\n"

    assert out == expected("<user>Hello<assistant>")
    assert run("generate", folder, *options, "--raw")[1] == expected("Hello")


def test_generate_samples_by_seed(run: Run, folder: str) -> None:
    options = (
        "--prompt",
        "Hi",
        "--preset",
        "W4A8KV8",
        "--temperature",
        "2",
        "--max-new-tokens",
        "12",
    )
    first, again, other = (
        run("generate", folder, *options, "--seed", seed)[1] for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_reference_backend_runs(run: Run, folder: str, text: str) -> None:
    options = ("--text", text, *SIZES, "--preset", "W4A16KV16", "--json")
    kernel = only_json(run("eval", folder, *options)[1])
    reference = only_json(run("eval", folder, *options, "--backend", "reference")[1])
    assert kernel["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-3)


def test_dtype_is_that_of_what_is_not_quantized(run: Run, folder: str, text: str) -> None:
    options = ("--text", text, *SIZES, "--json")
    full = only_json(run("eval", folder, *options)[1])
    half = only_json(run("eval", folder, *options, "--dtype", "bfloat16")[1])
    assert half["weight_bytes"] * 2 == full["weight_bytes"]


def test_info(run: Run) -> None:
    code, out, _ = run("info", "--json")
    assert code == 0
    facts = only_json(out)
    assert facts["quarot"] == quarot.__version__
    assert facts["torch"] == torch.__version__
    assert facts["cpu_isa"] in ("baseline", "avx2", "avx512", "amx")
    assert facts["kernels"] == quarot.ops.kernels()
    assert {"hadamard", "linear_int4", "attention"} <= facts["kernels"].keys()
    code, out, _ = run("info")
    assert code == 0
    assert all(op in out for op in facts["kernels"])


def test_demo_shows_four_forms_and_their_answers(run: Run, folder: str) -> None:
    code, out, _ = run(
        "demo", "--model", folder, "--window", "32", "--windows", "2", "--max-new-tokens", "4"
    )
    assert code == 0
    for preset in ("unquantized", "W4A4KV4-rtn", "W4A4KV4", "W4A8KV4"):
        assert preset in out
    assert out.count(demo.QUESTION) == 1
    assert "2 windows of 32 tokens" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["eval", "{model}", "--preset", "W4A4"], 2, "preset: got 'W4A4', needs W<bits>A<bits>"),
        (["eval", "{model}", "--preset", "W3A4KV4"], 2, "w_bits: got 3, needs one of 4, 16"),
        (["convert", "{model}", "out", "--preset", "none"], 2, "nothing to convert"),
        (["eval", "{model}", "--text", "no such.txt"], 2, "text: cannot read 'no such.txt'"),
        (["eval", "{model}", "--dtype", "int8"], 2, "got 'int8', needs one of auto, float32"),
        (["eval", "{model}", "--backend", "gpu"], 2, "got 'gpu', needs one of kernel, reference"),
        (["eval", "{model}", "--device", "tpu0"], 2, "got 'tpu0', needs cpu, cuda or cuda:N"),
        (["eval", "{model}", "--device", "cuda:99"], 2, "got 'cuda:99', but torch sees"),
        (["eval", "{model}", "--window", "1"], 2, "--window"),
        (["eval", "{model}", "--seed", "-1"], 2, "--seed"),
        (["eval"], 2, "MODEL"),
        (["eval", "{model}", "--jsn"], 2, "--jsn"),
        (["frobnicate"], 2, "frobnicate"),
        (["generate", "{model}"], 2, "--prompt"),
        (["eval", "{model}", "--text", "{text}", "--windows", "999"], 1, "windows: got a text of"),
        (["eval", "no such folder/model.gguf"], 2, "there is no file no such folder/model.gguf"),
        (["eval", "./no-such-folder"], 2, "there is no file or folder ./no-such-folder"),
        (["eval", "{model}", "--reference", "/no/such"], 2, "there is no file or folder /no/such"),
    ],
)
def test_error_is_one_line(
    run: Run, folder: str, text: str, args: list[str], code: int, message: str
) -> None:
    args = [arg.format(model=folder, text=text) for arg in args]
    got, out, err = run(*args)
    assert got == code
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("quarot: error: ")
    assert message in line
    assert "Traceback" not in err


def test_each_library_prints_its_own_log(run: Run, folder: str, text: str) -> None:
    def report(*args: Any, **kwargs: Any) -> Any:
        logging.getLogger("other").warning("of another library")
        raise RuntimeError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_model", report)
        code, _, err = run("eval", folder, "--text", text)
    assert code == 1
    assert f"quarot: loading {folder}" in err
    assert "quarot: of another library" not in err


def test_without_arguments_there_is_help(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert all(verb in out for verb in ("convert", "eval", "generate", "info", "demo"))
    assert run("--version")[:2] == (0, f"quarot {quarot.__version__}\n")


def test_folder_without_a_model_is_named(run: Run, tmp_path: Path) -> None:
    code, out, err = run("eval", str(tmp_path))
    assert (code, out) == (2, "")
    assert f"there is no config.json in the folder {tmp_path}" in err.splitlines()[-1]


def test_checkpoint_cannot_be_converted_again(run: Run, folder: str, tmp_path: Path) -> None:
    assert run("convert", folder, str(tmp_path / "a"))[0] == 0
    code, _, err = run("convert", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 2
    assert "MODEL is a quarot checkpoint already (W4A4KV4), needs no --preset" in err
    assert not (tmp_path / "b").exists()


def test_as_a_process(folder: str, text: str) -> None:
    """Nothing but the object is on stdout, and the exit code is the command's."""

    def process(*args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "quarot", *args]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    good = process("eval", folder, "--preset", "W4A4KV4", "--text", text, *SIZES, "--json")
    assert good.returncode == 0, good.stderr
    assert only_json(good.stdout)["preset"] == "W4A4KV4"
    bad = process("eval", folder, "--preset", "W4A4")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr
