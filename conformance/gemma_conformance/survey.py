"""Runs all systems on all checkpoints: `survey` gives the matrix."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from gemma_conformance.diagnose import Mutants
from gemma_conformance.execute import execute
from gemma_conformance.faults import FAULTS
from gemma_conformance.kit import Case, Kit
from gemma_conformance.matrix import CHAT, SINGLE_STEPS, Matrix, Row, Run, combine, judge
from gemma_conformance.systems import System

TRAITS = (*dict.fromkeys(fault.trait for fault in FAULTS), SINGLE_STEPS, CHAT)
Progress = Callable[[str], None]


def survey(
    kit: Kit,
    cases: Sequence[Case],
    systems: Sequence[System],
    pythons: Mapping[str, str],
    timeout_s: float,
    tell: Progress,
    save: Callable[[Matrix], None],
) -> None:
    """`pythons` gives another Python for a system's name. `save` gets the matrix so far."""
    mutants = {case.name: Mutants(kit.reference(case), case.tokens) for case in cases}
    rows: list[Row] = []
    for system in systems:
        runs: list[Run] = []
        versions: dict[str, str] = {}
        for case in cases:
            tell(f"{system.name} on {case.name}")
            output = execute(kit, case, system, pythons.get(system.name), timeout_s)
            versions.update(output.versions)
            run = judge(case, system, output, mutants[case.name])
            tell(f"{system.name} on {case.name}: {_line(run)}")
            runs.append(run)
        rows.append(_row(system, versions, runs))
        save(_matrix(kit, rows))


def _matrix(kit: Kit, rows: Sequence[Row]) -> Matrix:
    date = datetime.now(UTC).date().isoformat()
    return Matrix(date, dict(kit.made_with), TRAITS, tuple(rows))


def _row(system: System, versions: dict[str, str], runs: Sequence[Run]) -> Row:
    return Row(
        system.name,
        system.about,
        system.precision,
        system.tolerance,
        versions,
        combine(runs, TRAITS),
        tuple(runs),
    )


def _line(run: Run) -> str:
    deltas = [delta for delta in (run.prefill_delta, run.decode_delta) if delta is not None]
    shown = f", Δ {max(deltas):.2g}" if deltas else ""
    return f"{run.verdict}{shown}{': ' if run.text else ''}{run.text}"
