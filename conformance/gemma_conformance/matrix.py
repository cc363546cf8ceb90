"""The matrix of systems and traits, and the judgement of one run.

A system is judged on each checkpoint; a trait by all checkpoints that have it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from gemma_conformance.diagnose import Mutants, difference
from gemma_conformance.execute import FIRST, Output
from gemma_conformance.faults import Fault
from gemma_conformance.kit import Case
from gemma_conformance.systems import System

CHAT = "chat tokens"
SINGLE_STEPS = "single steps"
_CLEAR = 3  # a fault is seen if it moves a logit by so many tolerances


class Verdict(StrEnum):
    OK = "ok"
    FAULT = "fault"  # a known one, which is named
    WRONG = "wrong"  # no known fault explains it
    CANT_RUN = "can't run"
    NOT_TOLD = "not told"  # the precision hides this trait, or the system doesn't say


@dataclass(frozen=True, slots=True)
class Cell:
    """What a system does with one trait."""

    trait: str
    verdict: Verdict
    text: str  # the fault, or the reason
    checkpoint: str = ""  # where; empty if on all
    delta: float | None = None  # largest difference of a logit on the checkpoints with this trait


@dataclass(frozen=True, slots=True)
class Run:
    """What a system does with one checkpoint."""

    checkpoint: str
    verdict: Verdict
    text: str
    prefill_delta: float | None  # all tokens in one call
    decode_delta: float | None  # one token at a time
    greedy: str  # "24 of 24"
    cells: tuple[Cell, ...]
    reproduce: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One system."""

    system: str
    about: str
    precision: str
    tolerance: float
    versions: dict[str, str]
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    date: str
    made_with: dict[str, str]  # versions of what computed the right logits
    traits: tuple[str, ...]
    rows: tuple[Row, ...]


def judge(case: Case, system: System, output: Output, mutants: Mutants) -> Run:
    """One run: its differences, and a cell for each trait of the checkpoint."""
    whole, steps = slice(None), slice(FIRST - 1, None)
    prefill = _delta(output.prefill, output, mutants, whole)
    decode = _delta(output.decode, output, mutants, steps)
    faults: tuple[Fault, ...] = ()
    for found, delta, positions in (
        (output.prefill, prefill, whole),
        (output.decode, decode, steps),
    ):
        if found is not None and delta is not None and delta > system.tolerance and not faults:
            faults = mutants.explain(found, positions, system.tolerance, output.log_probabilities)
    verdict, text = _overall(output, system, prefill, decode, faults)
    cells = [
        _cell(trait, verdict, text, system, faults, mutants, prefill)
        for trait in dict.fromkeys(fault.trait for fault in mutants.faults)
    ]
    cells += [_single_steps(output, decode, system), _chat(case, output)]
    return Run(
        case.name,
        verdict,
        text,
        prefill,
        decode,
        _greedy(case, output),
        tuple(cells),
        _reproduce(case, system),
    )


def combine(runs: Sequence[Run], traits: Sequence[str]) -> tuple[Cell, ...]:
    """For each trait, the worst cell of the runs."""
    order = [Verdict.FAULT, Verdict.WRONG, Verdict.OK, Verdict.CANT_RUN, Verdict.NOT_TOLD]
    combined = []
    for trait in traits:
        found = [
            (cell, run.checkpoint) for run in runs for cell in run.cells if cell.trait == trait
        ]
        if not found:
            continue
        worst = min((cell.verdict for cell, _ in found), key=order.index)
        same = [(cell, name) for cell, name in found if cell.verdict == worst]
        deltas = [cell.delta for cell, _ in same if cell.delta is not None]
        where = "" if len(same) == len(found) else ", ".join(name for _, name in same)
        text = "; ".join(dict.fromkeys(cell.text for cell, _ in same if cell.text))
        combined.append(Cell(trait, worst, text, where, max(deltas, default=None)))
    return tuple(combined)


def _delta(
    found: NDArray[np.float64] | None, output: Output, mutants: Mutants, positions: slice
) -> float | None:
    if found is None:
        return None
    return difference(found, mutants.logits()[positions], output.log_probabilities)


def _overall(
    output: Output,
    system: System,
    prefill: float | None,
    decode: float | None,
    faults: tuple[Fault, ...],
) -> tuple[Verdict, str]:
    measured = [delta for delta in (prefill, decode) if delta is not None]
    if not measured:
        return Verdict.CANT_RUN, next(iter(output.errors.values()), "no logits")
    if faults:
        return Verdict.FAULT, "; ".join(fault.name for fault in faults)
    if max(measured) > system.tolerance:
        return Verdict.WRONG, "no known fault, nor up to three together, explains it"
    return Verdict.OK, ""


def _cell(
    trait: str,
    verdict: Verdict,
    text: str,
    system: System,
    faults: tuple[Fault, ...],
    mutants: Mutants,
    delta: float | None,
) -> Cell:
    named = "; ".join(fault.name for fault in faults if fault.trait == trait)
    if named:
        return Cell(trait, Verdict.FAULT, named, delta=delta)
    if verdict in (Verdict.WRONG, Verdict.CANT_RUN):
        return Cell(trait, verdict, text, delta=delta)
    clear = [f for f in mutants.faults if f.trait == trait and not f.is_subtle]
    least = min(map(mutants.effect, clear))
    if least < _CLEAR * system.tolerance:
        return Cell(trait, Verdict.NOT_TOLD, f"{system.precision} hides it", delta=delta)
    return Cell(trait, Verdict.OK, "", delta=None if faults else delta)


def _single_steps(
    output: Output,
    decode: float | None,
    system: System,
) -> Cell:
    """Whether tokens fed one at a time give the logits of all at once."""
    if output.decode is None:
        reason = output.errors.get("decode") or next(iter(output.errors.values()), "no logits")
        return Cell(SINGLE_STEPS, Verdict.CANT_RUN, reason)
    if output.prefill is None:
        is_ok = decode is not None and decode <= system.tolerance
        return Cell(SINGLE_STEPS, Verdict.OK if is_ok else Verdict.WRONG, "", delta=decode)
    gap = difference(output.decode, output.prefill[FIRST - 1 :])
    if gap <= system.tolerance:
        return Cell(SINGLE_STEPS, Verdict.OK, "", delta=gap)
    return Cell(SINGLE_STEPS, Verdict.WRONG, "other logits than for all tokens at once", delta=gap)


def _chat(case: Case, output: Output) -> Cell:
    if output.chat is None:
        failed = output.errors.get("chat")
        if failed or "load" in output.errors:
            return Cell(CHAT, Verdict.CANT_RUN, failed or output.errors["load"])
        return Cell(CHAT, Verdict.NOT_TOLD, "the system doesn't say which tokens it makes")
    right, doubled = case.chat, (case.chat[0], *case.chat)
    if isinstance(output.chat, int):
        is_right, is_doubled = output.chat == len(right), output.chat == len(doubled)
    else:
        is_right, is_doubled = output.chat == right, output.chat == doubled
    if is_right:
        return Cell(CHAT, Verdict.OK, "")
    if is_doubled:
        return Cell(CHAT, Verdict.FAULT, "two bos tokens")
    return Cell(CHAT, Verdict.WRONG, "other tokens than the template gives")


def _greedy(case: Case, output: Output) -> str:
    if output.greedy is None:
        return ""
    same = 0
    for found, right in zip(output.greedy, case.greedy, strict=False):
        if found != right:
            break
        same += 1
    return f"{same} of {len(case.greedy)}"


def _reproduce(case: Case, system: System) -> tuple[str, str]:
    packages = " ".join(f"'{package}'" for package in system.packages)
    return (
        f"pip install gemma-conformance {packages} && gemma-conformance make kit",
        f"gemma-conformance run kit --systems {system.name} --checkpoints {case.name}",
    )
