"""The conformance kit: every known fault is told from the right model, and named."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from gemma_conformance.checkpoints import CHECKPOINTS, build
from gemma_conformance.cli import run_command
from gemma_conformance.diagnose import Mutants, difference, log_probabilities
from gemma_conformance.execute import Output, execute
from gemma_conformance.faults import FAULTS, logits
from gemma_conformance.kit import Case, Kit, make_kit, open_kit
from gemma_conformance.matrix import CHAT, SINGLE_STEPS, Cell, Matrix, Row, Run, Verdict, judge
from gemma_conformance.page import render_page
from gemma_conformance.survey import TRAITS
from gemma_conformance.systems import FLOAT32, SYSTEMS, TOLERANCES, System, find_systems
from gemma_conformance.tokenizer import MESSAGES

NAMES = [checkpoint.name for checkpoint in CHECKPOINTS]
EVERY = pytest.mark.parametrize("name", NAMES)
BROKEN = System("broken", "no_such_runner", "a runner that doesn't exist", ())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("conformance") / "kit"
    make_kit(folder)
    return open_kit(folder)


@pytest.fixture(scope="module")
def all_mutants(kit: Kit) -> dict[str, Mutants]:
    return {case.name: Mutants(kit.reference(case), case.tokens) for case in kit.cases}


def find(kit: Kit, name: str) -> Case:
    (case,) = [case for case in kit.cases if case.name == name]
    return case


def right(case: Case, rows: Any) -> Output:
    """The output of a system with these logits, (T, V), and the right tokens."""
    return Output({}, {}, False, rows, rows[4:], case.greedy, case.chat)


@EVERY
def test_each_fault_moves_logits_far_beyond_the_tolerance(
    all_mutants: dict[str, Mutants], name: str
) -> None:
    mutants = all_mutants[name]
    assert len(mutants.faults) > 10
    for fault in mutants.faults:
        clear = 1.5 if fault.is_subtle else 30
        assert mutants.effect(fault) > clear * TOLERANCES[FLOAT32], fault.name


def test_every_fault_bites_in_some_checkpoint(all_mutants: dict[str, Mutants]) -> None:
    bitten = {fault for mutants in all_mutants.values() for fault in mutants.faults}
    assert set(FAULTS) - bitten == set()


@EVERY
def test_faults_of_a_checkpoint_differ_from_each_other(
    all_mutants: dict[str, Mutants], name: str
) -> None:
    """Otherwise the wrong one could be named."""
    mutants = all_mutants[name]
    for first in mutants.faults:
        for second in mutants.faults:
            if first is not second:
                gap = difference(mutants.logits(first), mutants.logits(second))
                assert gap > TOLERANCES[FLOAT32], (first.name, second.name)


@EVERY
def test_rounding_is_far_below_the_tolerance(kit: Kit, name: str) -> None:
    """The weights are not chaotic: float64 gives the same logits."""
    case = find(kit, name)
    exact = logits(kit.reference(case).double(), list(case.tokens)).numpy()
    assert difference(exact, kit.expected(case).astype(np.float64)) < TOLERANCES[FLOAT32] / 10


@EVERY
def test_the_saved_folder_is_the_model_that_was_built(kit: Kit, name: str) -> None:
    """Its config names rope as published checkpoints do; bfloat16 holds the weights exactly."""
    (checkpoint,) = [one for one in CHECKPOINTS if one.name == name]
    case = find(kit, name)
    built = logits(build(checkpoint), list(case.tokens)).numpy()
    assert np.array_equal(built, kit.expected(case))
    loaded = logits(kit.reference(case), list(case.tokens)).numpy()
    assert difference(loaded.astype(np.float64), built.astype(np.float64)) < 1e-5


@EVERY
def test_the_tokens_of_the_chat_are_those_of_transformers(kit: Kit, name: str) -> None:
    from transformers import AutoTokenizer

    case = find(kit, name)
    tokenizer = AutoTokenizer.from_pretrained(kit.checkpoint(case))
    text = tokenizer.apply_chat_template(
        [dict(message) for message in MESSAGES], tokenize=False, add_generation_prompt=True
    )
    assert tuple(tokenizer(text, add_special_tokens=False).input_ids) == case.chat
    assert case.chat.count(2) == 1


@EVERY
def test_a_system_with_a_fault_is_told_which(
    kit: Kit, all_mutants: dict[str, Mutants], name: str
) -> None:
    case, mutants = find(kit, name), all_mutants[name]
    (system,) = find_systems(["gemma-onnx"])
    for fault in mutants.faults:
        run = judge(case, system, right(case, mutants.logits(fault)), mutants)
        assert (run.verdict, run.text) == (Verdict.FAULT, fault.name)
        verdicts = {cell.trait: cell.verdict for cell in run.cells}
        assert verdicts.pop(fault.trait) is Verdict.FAULT
        assert set(verdicts.values()) == {Verdict.OK}


def test_two_faults_at_once_are_both_named(kit: Kit, all_mutants: dict[str, Mutants]) -> None:
    case, mutants = find(kit, "gemma2-bf16"), all_mutants["gemma2-bf16"]
    (system,) = find_systems(["gemma-onnx"])
    chosen = [
        fault
        for fault in mutants.faults
        if fault.name in ("windows on the wrong layers", "embedding scale rounded to two decimals")
    ]
    run = judge(case, system, right(case, mutants.logits(*chosen)), mutants)
    assert run.text == "windows on the wrong layers; embedding scale rounded to two decimals"


def test_wrong_logits_that_no_fault_explains_are_wrong(
    kit: Kit, all_mutants: dict[str, Mutants]
) -> None:
    case, mutants = find(kit, "gemma2"), all_mutants["gemma2"]
    (system,) = find_systems(["gemma-onnx"])
    rows = mutants.logits() + np.random.default_rng(1).normal(0, 0.1, mutants.logits().shape)
    run = judge(case, system, right(case, rows), mutants)
    assert run.verdict is Verdict.WRONG
    not_numbers = np.full_like(rows, np.nan)
    assert judge(case, system, right(case, not_numbers), mutants).verdict is Verdict.WRONG


def test_log_probabilities_are_compared_as_such(kit: Kit, all_mutants: dict[str, Mutants]) -> None:
    case, mutants = find(kit, "gemma2"), all_mutants["gemma2"]
    (system,) = find_systems(["llama.cpp"])
    rows = log_probabilities(mutants.logits())
    output = Output({}, {}, True, rows, rows[4:], case.greedy, len(case.chat) + 1)
    run = judge(case, system, output, mutants)
    assert run.verdict is Verdict.OK
    (chat,) = [cell for cell in run.cells if cell.trait == CHAT]
    assert (chat.verdict, chat.text) == (Verdict.FAULT, "two bos tokens")


def test_single_steps_that_differ_are_wrong_there(
    kit: Kit, all_mutants: dict[str, Mutants]
) -> None:
    case, mutants = find(kit, "gemma2"), all_mutants["gemma2"]
    (system,) = find_systems(["gemma-onnx"])
    rows = mutants.logits()
    output = Output({}, {}, False, rows, rows[4:] + 1.0, case.greedy, case.chat)
    run = judge(case, system, output, mutants)
    (steps,) = [cell for cell in run.cells if cell.trait == SINGLE_STEPS]
    assert steps.verdict is Verdict.WRONG
    assert run.verdict is Verdict.WRONG


def test_a_low_precision_does_not_claim_what_it_can_t_see(
    kit: Kit, all_mutants: dict[str, Mutants]
) -> None:
    case, mutants = find(kit, "gemma2"), all_mutants["gemma2"]
    (system,) = find_systems(["gemma-coreml"])
    run = judge(case, system, right(case, mutants.logits()), mutants)
    verdicts = {cell.trait: cell.verdict for cell in run.cells}
    assert verdicts["gelu"] is Verdict.NOT_TOLD
    assert verdicts["window"] is Verdict.OK


def test_our_onnx_bundle_passes(kit: Kit, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    json_file, page = tmp_path / "matrix.json", tmp_path / "matrix.html"
    options = ["--systems", "gemma-onnx", "--checkpoints", "gemma2-bf16"]
    code = run_command(
        ["run", str(kit.folder), *options, "--json", str(json_file), "--html", str(page)]
    )
    assert code == 0
    matrix = msgspec.json.decode(json_file.read_bytes(), type=Matrix)
    assert matrix.traits == TRAITS
    (row,) = matrix.rows
    assert {cell.verdict for cell in row.cells} == {Verdict.OK}
    (run,) = row.runs
    case = find(kit, "gemma2-bf16")
    assert run.greedy == f"{len(case.greedy)} of {len(case.greedy)}"
    assert set(row.versions) == {"gemma-export", "onnxruntime"}
    assert page.read_bytes() == render_page(matrix)


def test_a_broken_runner_gives_cells_and_no_crash(
    kit: Kit, all_mutants: dict[str, Mutants]
) -> None:
    case = find(kit, "gemma2")
    output = execute(kit, case, BROKEN, None, 60)
    run = judge(case, BROKEN, output, all_mutants["gemma2"])
    assert run.verdict is Verdict.CANT_RUN
    assert run.text == "ModuleNotFoundError: No module named 'no_such_runner'"
    assert {cell.verdict for cell in run.cells} == {Verdict.CANT_RUN}


def test_a_missing_python_and_a_slow_system_give_cells(kit: Kit) -> None:
    case = find(kit, "gemma2")
    missing = execute(kit, case, BROKEN, "no/such/python", 60)
    assert missing.errors == {"load": "can't start no/such/python: No such file or directory"}
    slow = execute(kit, case, SYSTEMS[0], None, 0.01)
    assert slow.errors == {"load": "stopped after 0 s"}


def test_the_page_escapes_what_systems_say() -> None:
    bad = "<script>alert('x')</script>"
    cell = Cell("window", Verdict.CANT_RUN, bad, bad)
    run = Run("gemma2", Verdict.CANT_RUN, bad, None, None, "", (cell,), (bad, bad))
    row = Row(bad, bad, FLOAT32, 1e-3, {bad: bad}, (cell,), (run,))
    made_with = {"transformers": bad, "torch": "1"}
    page = render_page(Matrix("2026-01-01", made_with, TRAITS, (row,))).decode()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 8
    assert not re.search(r"(src|href)=\"(?!data:)", page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "{kit}", "--systems", "unheard"], "no system 'unheard'; choose from "),
        (["run", "{kit}", "--checkpoints", "gemma9"], "no checkpoint 'gemma9'; choose from "),
        (["run", "{tmp}"], "is not a kit: it has no kit.json; make one: "),
        (["run", "{kit}", "--python", "mlx-lm"], "expected SYSTEM=PATH"),
        (["run", "{kit}", "--json", "{tmp}/no/matrix.json"], "which is not a folder"),
        (["make", "{kit}"], "exists already; give a new folder"),
    ],
)
def test_errors_are_one_line(
    kit: Kit,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    code = run_command([word.format(kit=kit.folder, tmp=tmp_path) for word in arguments])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_kit_of_another_schema_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kit.json").write_text(json.dumps({"schema": 0, "made_with": {}, "cases": []}))
    assert run_command(["run", str(tmp_path)]) == 1
    assert "has schema 0, expected 1" in capsys.readouterr().err
