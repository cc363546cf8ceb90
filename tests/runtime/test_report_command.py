import re
from pathlib import Path

import pytest

from gemma_runtime.cli import run_command
from tests.runtime.report.recorded import DATA, FIGURES

Captured = pytest.CaptureFixture[str]
TINY = str(DATA / "tiny")


def test_the_page_is_written_and_its_path_printed(tmp_path: Path, capsys: Captured) -> None:
    page = tmp_path / "new folder/report.html"
    assert run_command(["report", TINY, "--from", str(FIGURES), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_an_unknown_file_is_one_line_and_writes_nothing(tmp_path: Path, capsys: Captured) -> None:
    page, wrong = tmp_path / "report.html", tmp_path / "wrong.json"
    wrong.write_text('{"a": 1}')
    assert run_command(["report", TINY, "--from", str(wrong), "-o", str(page)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {wrong} has no figures; expected")
    assert not page.exists()


def test_a_folder_is_no_place_for_a_page(tmp_path: Path, capsys: Captured) -> None:
    assert run_command(["report", TINY, "-o", str(tmp_path)]) == 1
    assert "is a folder; give a file for the page" in capsys.readouterr().err


def test_inputs_need_all(tmp_path: Path, capsys: Captured) -> None:
    arguments = ["report", TINY, "--tasks", "mmlu", "-o", str(tmp_path / "report.html")]
    assert run_command(arguments) == 2
    assert "need --all" in capsys.readouterr().err


def test_all_measures_what_is_missing(tmp_path: Path, capsys: Captured) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the ring\nthe king\n")
    (tmp_path / "en.txt").write_text("the king in the user thing")
    page = tmp_path / "report.html"
    inputs = ["--text", str(tmp_path / "en.txt"), "--prompts", str(prompts), "--repeats", "1"]
    inputs += ["--replies", "2"]
    figures = ["--from", str(FIGURES / "bench.json")]
    assert run_command(["report", TINY, *figures, "--all", *inputs, "-o", str(page)]) == 0
    shown = capsys.readouterr().err
    for step in ("verify", "eval", "inspect", "safety"):
        assert f"{step} {TINY}"[:40] in shown.replace("\n", "")
    assert "bench" not in shown
    text = page.read_text("utf-8")
    assert "read back from the files" in text
    assert re.search(r'"refusals": ?\{"a": ?0', text)  # null without replies
    assert text.count("Not measured.") == 2  # tasks and structured replies
