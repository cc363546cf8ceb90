"""What a cell will take, and why a budget or the machine rules it out, before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import psutil

from gemma_export.plan import Plan
from gemma_export.request import plan_exports
from gemma_export.search.cells import Cell
from gemma_export.search.measures import MEASURES, Stage, shown
from gemma_export.search.question import Question
from gemma_export.targets import require_packages, target_spec
from gemma_runtime.backend_table import BACKENDS
from gemma_runtime.errors import GemmaError, MissingExtra, RecipeError, TargetError
from gemma_runtime.machine import format_bytes, measure_bandwidth, physical_cores

_ABOVE = 1.35  # planned memory is at most so many times the measured one: tests/export/test_plan.py
_CACHED = 256 << 20  # weights below this may stay in the processor's caches
_FASTER = 1.5  # times the measured bandwidth: a bound that a busy machine does not lower too far

# Seconds of an export without calibration, on two cores: docs/measurements.md, "Export".
_CORES = 2
_START = 4.0  # until Python and torch are loaded
_ROUNDING = 52e-9  # per weight: reading, rounding, goldens, writing (270M, 2b and 27b)


@dataclass(frozen=True, slots=True)
class Estimate:
    recipe: str
    bits_per_weight: float
    size: int  # bytes of the artifact
    resident: int  # bytes: peak of a session
    export_peak: int  # bytes
    export_seconds: float  # roughly
    read_per_token: int  # bytes of weights that each new token reads

    def fastest(self, bandwidth: float) -> float | None:
        """Tokens/s that memory (bytes/s) allows at most; None for weights that caches may hold."""
        return bandwidth / self.read_per_token if self.read_per_token > _CACHED else None


@dataclass(frozen=True, slots=True)
class Planned:
    cell: Cell
    estimate: Estimate | None  # None if there can be no such bundle
    ruled_out: str | None = None  # why no work is done for it


def plan_cells(question: Question) -> list[Planned]:
    """Every cell with its estimate, or with the reason why there is none."""
    bandwidth = measure_bandwidth(physical_cores()) if "decode" in question.limits else None
    planned = [_plan(cell, question, bandwidth) for cell in question.cells]
    return [one for one in planned if one is not None]


def _plan(cell: Cell, question: Question, bandwidth: float | None) -> Planned | None:
    try:
        (plan,) = plan_exports(cell.request)
        require_packages(cell.target)
    except (RecipeError, TargetError) as error:
        return None if question.is_open else Planned(cell, None, str(error))
    except GemmaError as error:
        return Planned(cell, None, str(error))
    estimate = _estimate(plan)
    return Planned(cell, estimate, _refusal(cell, estimate, question, bandwidth))


def _estimate(plan: Plan) -> Estimate:
    file = plan.artifact
    return Estimate(
        recipe=plan.recipe,
        bits_per_weight=plan.bits_per_weight,
        size=file.total,
        resident=plan.run.total,
        export_peak=plan.export_peak_bytes,
        export_seconds=_seconds(plan),
        read_per_token=file.attention + file.mlp + file.norms + (file.head or file.table),
    )


def _seconds(plan: Plan) -> float:
    """Roughly; calibration as if nothing were kept of it."""
    calibrating = 0.0 if plan.calibration is None else plan.calibration.seconds or 0.0
    return _START + _ROUNDING * plan.parameters.total * _CORES / physical_cores() + calibrating


def _refusal(
    cell: Cell, estimate: Estimate, question: Question, bandwidth: float | None
) -> str | None:
    """Why the cell is not worth any work; None if it may be."""
    limits = question.limits
    if question.stages != {Stage.EXPORT} and (reason := _unrunnable(cell.target)):
        return reason
    machine = psutil.virtual_memory().total
    if estimate.export_peak > machine:
        needed, has = format_bytes(estimate.export_peak), format_bytes(machine)
        return f"its export needs about {needed}, the machine has {has}"
    if estimate.size > limits.get("size", estimate.size):
        return _beyond("size", estimate.size, limits)
    if estimate.resident > limits.get("resident", estimate.resident) * _ABOVE:
        beyond = _beyond("resident", estimate.resident, limits)
        return f"{beyond}; estimates are at most a third too high"
    if question.minutes is not None and estimate.export_seconds > 60 * question.minutes:
        minutes = estimate.export_seconds / 60
        return (
            f"its export takes about {minutes:.1f} minutes, the budget allows {question.minutes:g}"
        )
    return _too_slow(estimate, limits, bandwidth)


def _unrunnable(target: str) -> str | None:
    """Why bundles of a target can't be evaluated here; None if they can."""
    if not target_spec(target).on_device:
        return (
            f"other engines run {target} bundles, so this machine can't measure them; objectives "
            "such as weights_kl and size need no runtime"
        )
    needs = BACKENDS[target].needs
    if needs is not None and find_spec(needs[0]) is None:
        return str(MissingExtra(*needs[1:]))
    return None


def _beyond(name: str, value: float, limits: Mapping[str, float]) -> str:
    title = MEASURES[name].title
    return f"{title} of about {shown(name, value)}, the budget allows {shown(name, limits[name])}"


def _too_slow(
    estimate: Estimate, limits: Mapping[str, float], bandwidth: float | None
) -> str | None:
    fastest = None if bandwidth is None else estimate.fastest(bandwidth)
    if fastest is None or fastest * _FASTER >= limits["decode"]:
        return None
    return (
        f"a token reads {format_bytes(estimate.read_per_token)}: at most "
        f"{shown('decode', fastest)} at this machine's {(bandwidth or 0) / 1e9:.1f} GB/s, the "
        f"budget asks for {shown('decode', limits['decode'])}"
    )


def check_memory(planned: Sequence[Planned], workers: int) -> str | None:
    """Why so many exports can't run side by side; None if they can."""
    peaks = sorted((one.estimate.export_peak for one in planned if one.estimate), reverse=True)
    needed, machine = sum(peaks[:workers]), psutil.virtual_memory().total
    if needed <= machine:
        return None
    return (
        f"--workers {workers}: so many exports need about {format_bytes(needed)}, this machine has "
        f"{format_bytes(machine)}; give fewer"
    )
