"""`gemma-export search` from its file to the bundle to take, with real exports and figures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemma_export.cli import run
from gemma_export.search.figures import read_figures
from gemma_export.search.job import Job, unfinished
from gemma_export.search.measures import Stage
from gemma_export.search.question import ask
from gemma_export.search.steps import Jobs
from gemma_runtime.bundle import open_bundle
from gemma_runtime.cache import cache_folder
from gemma_runtime.errors import SearchError
from gemma_runtime.proof.evaluate import evaluate_bundle
from gemma_runtime.report.wording import nats
from tests.export.gguf_files import GEMMA2
from tests.export.search.searching import (
    BENCH,
    BY_WEIGHTS,
    CONTEXT,
    by_recipe,
    search,
    write_model,
    write_search,
)

ALL = {
    "recipes": ["int4", "none"],
    "context": CONTEXT,
    "text": "text",
    "bench": BENCH,
    "objectives": ["kl", "size", "decode"],
}
RANDOM = {"checkpoint": "random:1", "config": "config.json"}
NO_TOKENIZER = "export: random:1 has no tokenizer, so --eval-text can't be encoded"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search that has a failing cell, and with its output."""
    folder = tmp_path_factory.mktemp("search")
    write_model(folder)
    (folder / "config.json").write_text(json.dumps(GEMMA2))
    # Random weights have no tokenizer for the text: an export that fails after its plan.
    file = write_search(folder, checkpoints=["model.gguf", RANDOM, "missing.gguf"], **ALL)
    assert run(["search", str(file), f"--output={folder / 'out'}", "--json"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "search.json").read_text())
    return content


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same folder once more, for tests that change it."""
    shutil.copytree(folder, tmp_path / "copied")
    return tmp_path / "copied"


def test_cells_are_exported_evaluated_and_measured(folder: Path, found: dict[str, Any]) -> None:
    cells = by_recipe({"cells": [one for one in found["cells"] if one["figures"]]})
    assert set(cells) == {"int4", "none"}
    for cell in cells.values():
        bundle = open_bundle(folder / "out" / cell["bundle"])
        teacher = evaluate_bundle(bundle).total.teacher
        assert teacher is not None
        figures = cell["figures"]
        assert figures["kl"] == pytest.approx(teacher.kl.value, rel=1e-3, abs=1e-9)
        assert figures["top1"] == teacher.top1
        assert figures["weights_kl"] == bundle.manifest.quality.mean_kl
        assert figures["verdict"] == "PASS"
        assert min(figures[name] for name in ("decode", "prefill", "load", "resident")) > 0
        assert set(cell["seconds"]) == {"export", "verify", "eval", "bench"}
    assert cells["none"]["figures"]["kl"] < cells["int4"]["figures"]["kl"]
    assert cells["none"]["figures"]["size"] > cells["int4"]["figures"]["size"]


def test_both_ends_of_a_front_are_on_it_and_one_is_to_be_taken(found: dict[str, Any]) -> None:
    states = {cell["recipe"]: cell["state"] for cell in found["cells"] if cell["figures"]}
    assert sorted(states.values()) == ["front", "take"]
    taken = next(cell for cell in found["cells"] if cell["state"] == "take")
    assert found["take"] == taken["name"]
    assert found["why"].startswith("nearest to the best of every objective, of 2 bundles on the")


def test_cells_that_fail_stand_there_with_one_line(found: dict[str, Any]) -> None:
    reasons = {cell["model"]: cell["reason"] for cell in found["cells"] if not cell["figures"]}
    assert reasons["random:1"] == NO_TOKENIZER
    assert "missing.gguf" in reasons["missing.gguf"]
    states = {cell["model"]: cell["state"] for cell in found["cells"] if not cell["figures"]}
    assert states == {"random:1": "failed", "missing.gguf": "ruled out"}


def test_finished_cells_are_reused_and_failed_ones_tried_again(
    copied: Path, found: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    bundles = copied / "out" / "bundles"
    before = {path: path.stat().st_mtime_ns for path in bundles.rglob("*")}
    searched = {**ALL, "checkpoints": ["model.gguf", RANDOM], "recipes": "int4"}
    again = search(write_search(copied, **searched), copied / "out", capfd)
    assert {path: path.stat().st_mtime_ns for path in bundles.rglob("*")} == before
    reused, failed = again["cells"]
    assert reused["is_reused"]
    assert reused["figures"] in [cell["figures"] for cell in found["cells"]]
    assert (failed["is_reused"], failed["reason"]) == (False, NO_TOKENIZER)


def test_the_console_shows_the_front_the_reasons_and_the_page(
    copied: Path, found: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", str(write_search(copied, **ALL)), f"--output={copied / 'out'}"]) == 0
    shown, progress = capfd.readouterr()
    assert re.search(r"^ cell .*KL to float32.*artifact.*decoding", shown, re.MULTILINE)
    for cell in found["cells"]:  # the mean over languages is not all that the console shows
        if figures := cell["figures"]:
            worst = f"{nats(figures['worst_kl'])} ({figures['worst_language']})"
            assert re.search(
                rf"^ {cell['recipe']} onnx .* {re.escape(worst)} ", shown, re.MULTILINE
            )
    assert len(re.findall(r"^ (?:int4|none) onnx .* (?:take|front) *$", shown, re.MULTILINE)) == 2
    assert " ".join(shown.split()).count(f"take {found['take']}: nearest to the best of") == 1
    assert shown.splitlines()[-1].endswith("search.html")
    assert progress.count("reused") == 2


def test_a_changed_input_has_just_its_stages_done_again(copied: Path) -> None:
    assert _left(copied) == []
    assert _left(copied, bench={**BENCH, "repeats": 2}) == ["bench"]
    assert _left(copied, tasks="arc_easy") == ["tasks"]
    everything = ["export", "verify", "eval", "bench"]
    assert _left(copied, max_ram="4 GiB", device="cpu") == []  # which change nothing in the bundle
    assert _left(copied, max_vram="4 GiB", device="cuda") == everything  # sums in another order
    assert _left(copied, context=32) == everything
    (copied / "text" / "en.txt").write_text("an ban")
    assert _left(copied) == everything


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("figures/*/eval.json", ["eval"]),
        ("figures/*/done.json", ["export", "verify", "eval", "bench"]),
        ("bundles/*/model.onnx.data", ["export", "verify", "eval", "bench"]),
    ],
)
def test_what_is_lost_is_made_again(copied: Path, name: str, stages: list[str]) -> None:
    for file in (copied / "out").glob(name):
        file.unlink()
    assert _left(copied) == stages


def test_figures_that_are_not_numbers_fail_their_cell(copied: Path) -> None:
    job = _job(copied)
    text = job.file(Stage.EVAL).read_text()
    job.file(Stage.EVAL).write_text(re.sub(r'"kl":\{"value":[^,]*', '"kl":{"value":null', text))
    with pytest.raises(SearchError, match="kl is not a number: the quantized model is broken"):
        read_figures(job, ())


def test_the_page_shows_the_front_and_asks_nobody(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / "out" / "search.html").read_text()
    assert page.count("<svg viewBox") == 3  # one for each two objectives
    assert f"Take {found['take']}" in page
    assert NO_TOKENIZER.replace("'", "&#39;") in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    (block,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    assert json.loads(block)["take"] == found["take"]
    for table in re.findall(r"<table[^>]*>.*?</table>", page, re.DOTALL):
        rows = [
            len(re.findall(r"<t[dh]", row)) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        assert len(set(rows)) == 1  # a heading for every column


def test_a_budget_rules_cells_out_before_any_work(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_search(folder, **ALL, budget={"size": "2 MiB"})
    planned = search(file, tmp_path / "out", capfd, "--plan")
    cells = by_recipe(planned)
    assert cells["int4"]["state"] == "planned"
    assert cells["none"]["reason"] == "artifact of about 5 MiB, the budget allows 2 MiB"
    assert cells["int4"]["estimate"]["size"] < 2 << 20 < cells["none"]["estimate"]["size"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"resident": "1.3 GiB"}, "peak memory of about 13.17 GiB, the budget allows 1.30 GiB"),
        ({"decode": 1e6}, "the budget asks for 1000000.0 tokens/s"),
        ({"minutes": 0.01}, "minutes, the budget allows 0.01"),
    ],
)
def test_large_models_are_ruled_out_by_estimates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], budget: dict[str, object], reason: str
) -> None:
    (tmp_path / "text.txt").write_text("text")
    model = {"checkpoint": "random", "size": "2b"}
    content = {"recipes": "none", "text": "text.txt", "budget": budget}
    file = write_search(tmp_path, checkpoints=model, **content)
    (cell,) = search(file, tmp_path, capfd, "--plan")["cells"]
    assert cell["state"] == "ruled out"
    assert reason in cell["reason"]
    assert run(["search", str(file), f"--output={tmp_path / 'out'}"]) == 1
    assert "all 1 cells are ruled out" in capfd.readouterr().err


def test_without_recipes_all_that_a_target_holds_are_tried(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_search(folder, **BY_WEIGHTS)
    recipes = set(by_recipe(search(file, tmp_path, capfd, "--plan")))
    assert {"int4", "mixed-gptq", "int8-smooth", "none"} < recipes
    assert not {"source", "int8-channel"} & recipes  # ONNX has no kernel for scales per channel


def test_a_runtime_that_is_missing_is_told_before_any_work(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("gemma_export.search.estimate.find_spec", lambda name: None)
    file = write_search(folder, **ALL | {"targets": ["gguf", "hf"]})
    cells = search(file, tmp_path, capfd, "--plan")["cells"]
    reasons = {cell["target"]: cell["reason"] for cell in cells}
    assert reasons["gguf"].startswith("llama-cpp-python is not installed")
    assert reasons["hf"].startswith("other engines run hf bundles")


def test_ctrl_c_keeps_finished_cells_and_the_next_run_goes_on(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two targets, one store: its weights are rounded once, by whichever cell comes first."""
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "cache"))  # with no other test's stores
    file = write_search(folder, **BY_WEIGHTS | {"targets": ["gguf", "onnx"], "recipes": "int8"})
    code = (  # a shell's background jobs ignore the signal, and their children inherit that
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from gemma_export.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "search", str(file), f"--output={tmp_path / 'out'}"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        done = tmp_path / "out" / "figures"
        while process.poll() is None and not list(done.glob("*-gguf-*/done.json")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the running stage gets it too
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert b"interrupted; run it again to go on: what was finished is kept" in errors
    assert not list((tmp_path / "out" / "bundles").glob(".*"))

    cells = {one["target"]: one for one in search(file, tmp_path / "out", capfd)["cells"]}
    assert cells["gguf"]["is_reused"]
    assert not cells["onnx"]["is_reused"]
    assert cells["gguf"]["figures"]["weights_kl"] == cells["onnx"]["figures"]["weights_kl"]
    assert len(list(cache_folder().glob("stores/*.safetensors"))) == 1


def test_two_searches_in_one_folder_don_t_mix(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    with FileLock(folder / "out" / ".search.lock"):
        file = write_search(folder, **ALL)
        assert run(["search", str(file), f"--output={folder / 'out'}"]) == 1
    assert "another search runs in" in capfd.readouterr().err


def test_workers_of_ray_are_ray_s_own(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_search(folder, **ALL)
    assert run(["search", str(file), "--ray=auto", "--workers=2"]) == 2


def _job(folder: Path, **content: Any) -> Job:
    question = ask(write_search(folder, **ALL | {"recipes": "int4"} | content))
    (cell,) = question.cells
    return Jobs(question, folder / "out").job(cell)


def _left(folder: Path, **content: Any) -> list[str]:
    """The stages that are to be done for the int4 cell."""
    return [step.stage.value for step in unfinished(_job(folder, **content))]
