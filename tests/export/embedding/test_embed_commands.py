"""Encoders on the command line: plans, exports, vectors, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_export.cli import run
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.quantize.recipe import find_recipe
from gemma_export.request import plan_exports
from gemma_runtime.bundle import MANIFEST, open_bundle
from gemma_runtime.cli import run_command
from gemma_runtime.embedding_bundle import EmbeddingBundle, open_embedding_bundle
from gemma_runtime.errors import BundleError, TargetError

Captured = pytest.CaptureFixture[str]


def _error(captured: Captured) -> str:
    (line,) = captured.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_export_by_default_takes_8_bits_and_says_so(
    first: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["--checkpoint", str(first), "--output", str(tmp_path / "made")]
    assert run([*arguments, "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert (summary["recipe"], summary["dimensions"]) == ("int8", 64)
    assert summary["prompts"] == ["query", "document"]
    assert 0.99 < summary["quality"]["min_cosine"] < 1
    assert run([*arguments, "--force"]) == 0
    shown, progress = capsys.readouterr()
    assert "64 numbers; texts of up to 128 tokens" in shown
    assert "recipe int8: vectors have no calibrated recipes" in " ".join(progress.split())


def test_a_plan_has_the_bytes_of_the_artifact(
    first: Path, bundle: EmbeddingBundle, capsys: Captured
) -> None:
    assert run(["--checkpoint", str(first), "--plan", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    data = [n for n in bundle.manifest.files if n.endswith(".onnx.data")]
    # Files end with their last tensor; the plan counts whole pages.
    held = sum(-(-bundle.manifest.files[name].bytes // 4096) * 4096 for name in data)
    assert plan["artifact"]["total"] == held
    assert (plan["recipe"], plan["context_length"], plan["dimensions"]) == ("int8", 128, 64)
    assert plan["reason"].startswith("vectors have no calibrated recipes")
    assert run(["--size", "300m", "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "embeddinggemma to onnx: vectors of 768 numbers, 2048 tokens of context" in shown
    assert "(stays on storage)" in shown


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            ["--target", "executorch"],
            "executorch has no graph for models that give vectors",
        ),
        (["--target", "onnx,gguf"], "gguf has no graph"),
        (["--quant", "int4-gptq"], "recipe int4-gptq is calibrated, which models that give vect"),
        (["--quant", "int8-smooth"], "recipe int8-smooth is calibrated"),
        (["--bits", "6"], "--bits is for models that generate text"),
        (["--cache", "int8"], "--cache is for models"),
        (["--prefill", "64"], "--prefill is for models"),
        (["--full-cache"], "--full-cache is for models"),
        (["--eval-text", "."], "--eval-text is for models"),
        (["--context", "300"], "--context is 300; this model supports 2 to 256 tokens"),
        (["--context", "1"], "--context is 1"),
        (["--require-exact"], "codes"),
        (["--max-ram", "100MiB"], "--max-ram allows 100 MiB"),
    ],
)
def test_what_has_no_meaning_for_vectors_is_refused(
    first: Path, tmp_path: Path, capsys: Captured, flags: list[str], match: str
) -> None:
    arguments = ["--checkpoint", str(first), "--output", str(tmp_path / "made"), *flags]
    assert run(arguments) == 1
    assert match in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "made").exists()
    if flags[0] not in ("--require-exact", "--max-ram"):  # which need an export
        assert run([*arguments, "--plan"]) == 1
        assert match in _error(capsys)


def test_functions_for_decoders_refuse_an_encoder(first: Path, tmp_path: Path) -> None:
    request = ExportRequest(("onnx",), find_recipe("int8"), str(first), output=tmp_path / "made")
    for function in (export_bundles, plan_exports):
        with pytest.raises(TargetError, match="gives vectors"):
            function(request)


def test_search_names_an_encoder(first: Path, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(f"checkpoints: {first}\ntargets: onnx\nrecipes: int8\nobjectives: [size]\n")
    assert run(["search", str(file), f"--output={tmp_path / 'out'}"]) == 1
    assert "gives vectors, expected a model that generates text" in _error(capsys)


def test_embed_prints_tokens_vectors_and_cosines(
    bundle: EmbeddingBundle, tmp_path: Path, capsys: Captured
) -> None:
    texts = ["the user", "the users", "xyz!"]
    output = tmp_path / "vectors.npy"
    arguments = ["embed", str(bundle.directory), *texts, "--prompt", "query"]
    assert run_command([*arguments, "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["dimensions"]) == ("query", 64)
    assert found["digest"] == bundle.digest()
    assert [one["text"] for one in found["texts"]] == texts
    stored = np.load(output)
    assert stored.dtype == np.float32
    assert stored.tolist() == [one["vector"] for one in found["texts"]]

    assert run_command([*arguments, "--dimensions", "8"]) == 0
    shown, hint = capsys.readouterr()
    assert "of 8 numbers" in shown
    assert "cosines" in shown
    assert hint == ""


def test_embed_reads_lines_and_tells_of_prompts(
    bundle: EmbeddingBundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert run_command(["embed", str(bundle.directory), "-", "--json"]) == 0
    shown, hint = capsys.readouterr()
    assert [one["text"] for one in json.loads(shown)["texts"]] == ["one", "two"]
    assert hint == "without a prompt; the model was trained with --prompt query, document\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run_command(["embed", str(bundle.directory), "-"]) == 1
    assert "stdin has no text" in _error(capsys)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["x", "--prompt", "nope"], "unknown prompt 'nope'; the bundle has:"),
        (["x", "--prompt", "query", "--dimensions", "65"], "65 dimensions, expected 1 to 64"),
        (["x " * 200, "--prompt", "query"], "--truncate"),
        (["x", "--prompt", "query", "--output", f"{__file__}/x.npy"], "x.npy: File exists"),
    ],
)
def test_embed_refuses_in_one_line(
    bundle: EmbeddingBundle, capsys: Captured, arguments: list[str], match: str
) -> None:
    assert run_command(["embed", str(bundle.directory), *arguments]) == 1
    assert match in _error(capsys)


def test_verify_and_inspect_know_both_kinds(bundle: EmbeddingBundle, capsys: Captured) -> None:
    assert run_command(["verify", str(bundle.directory), "--json"]) == 0
    verification = json.loads(capsys.readouterr().out)
    assert (verification["verdict"], verification["digest"]) == ("PASS", bundle.digest())
    assert run_command(["verify", str(bundle.directory)]) == 0
    assert "PASS" in capsys.readouterr().out
    assert run_command(["inspect", str(bundle.directory), str(bundle.directory), "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["same_codes"]
    held = comparison["bundles"][0]["codes_held"]
    assert held == bundle.manifest.quantization.codes_digest
    assert run_command(["inspect", str(bundle.directory)]) == 0
    assert "2 text 1" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "command",
    [["run", "x"], ["chat"], ["eval"], ["bench"], ["pack"], ["lm-eval", "--tasks", "arc_easy"]],
    ids=lambda command: command[0],
)
def test_commands_for_text_name_the_right_one(
    bundle: EmbeddingBundle, capsys: Captured, command: list[str]
) -> None:
    name, *others = command
    assert run_command([name, str(bundle.directory), *others]) == 1
    assert "use gemma-runtime embed" in _error(capsys)


def test_an_altered_bundle_is_refused(bundle: EmbeddingBundle, tmp_path: Path) -> None:
    manifest = json.loads((bundle.directory / MANIFEST).read_text())
    for field, value, match in (
        ("dimensions", 0, "dimensions is 0"),
        ("context_length", 2, "2 tokens around a text, and a context of 2"),
        ("default_prompt", "x", "none of the prompts"),
        ("kind", "decoder", "expected one that gives vectors"),
        ("kind", "router", "of kind 'router', expected encoder"),
        ("schema_version", 99, "update gemma-export"),
        ("graphs", {}, "no digest|no graph"),
        ("files", {}, "has no digest of it"),
        ("vocab_size", "x", "is not valid"),
    ):
        changed: dict[str, Any] = {**manifest, field: value}
        (tmp_path / MANIFEST).write_text(json.dumps(changed))
        for name in bundle.manifest.files:
            (tmp_path / name).write_bytes((bundle.directory / name).read_bytes())
        with pytest.raises(BundleError, match=match):
            open_embedding_bundle(tmp_path).manifest.graph("encode")
    with pytest.raises(BundleError, match="use gemma-runtime embed"):
        open_bundle(bundle.directory)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        open_embedding_bundle(tmp_path)
