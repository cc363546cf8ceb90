"""Reads files of figures: the JSON that the other commands print. What a file is, its content says.

Nothing in a file is trusted: it is read as data of a known type, or refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from gemma_runtime.contents.inspection import Comparison
from gemma_runtime.contents.subject import Subject
from gemma_runtime.errors import ReportError
from gemma_runtime.manifest import Agreement
from gemma_runtime.measure.bench import Benchmark
from gemma_runtime.measure.sustained import Sustained
from gemma_runtime.proof.compare_runs import RunComparison
from gemma_runtime.proof.language_figures import (
    DivergenceFigures,
    Estimate,
    Evaluation,
    TextFigures,
)
from gemma_runtime.proof.safety import SafetyComparison
from gemma_runtime.proof.verify import Verification
from gemma_runtime.proof.worst import WorstPosition
from gemma_runtime.report.phone import PhoneReport

_LARGEST = 64 << 20  # bytes of one file
_COMMANDS = (
    "gemma-runtime verify, eval, bench, inspect, compare, safety or lm-eval, of "
    "benchmarks/structured.py, or a phone app's report"
)


@dataclass(frozen=True, slots=True)
class Verified:
    subject: Subject
    verification: Verification


@dataclass(frozen=True, slots=True)
class Evaluated:
    subject: Subject
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class StructuredRate:
    """How often replies were JSON of a schema, asked for in one way."""

    way: str
    temperature: float
    requests: int
    valid_at_once: int
    valid: int
    wrong: int  # JSON that the schema forbids
    none: int  # no JSON
    new_tokens: int
    model_calls: int


@dataclass(frozen=True, slots=True)
class Structured:
    subject: Subject
    rates: tuple[StructuredRate, ...]


class TaskConfig(msgspec.Struct, frozen=True):
    """What lm_eval's results say about the bundle; other models have no such fields."""

    bundle: str | None = None
    bundle_digest: str | None = None
    runtime_versions: dict[str, str] = {}


class TaskScores(msgspec.Struct, frozen=True):
    """One run of lm_eval. A task's results are by `METRIC,FILTER`, their errors too."""

    config: TaskConfig
    results: dict[str, dict[str, Any]]
    questions: dict[str, dict[str, int]] = msgspec.field(name="n-samples", default_factory=dict)


Figures = (
    Verified
    | Evaluated
    | Structured
    | Benchmark
    | Sustained
    | Comparison
    | RunComparison
    | SafetyComparison
    | TaskScores
    | PhoneReport
)


@dataclass(frozen=True, slots=True)
class Source:
    """Figures, and where they are from."""

    name: str  # the file's name, or the command that measured them
    kind: str  # the command that prints such figures
    figures: Figures


def read_sources(paths: Iterable[Path]) -> list[Source]:
    """Read files, and the .json files in and below folders.

    Raises ReportError for a file that is not figures, and for a folder without any.
    """
    return [read_source(file) for path in paths for file in _files(path)]


def read_source(path: Path) -> Source:
    value = _load(path)
    for kind, keys, convert in _KINDS:
        if isinstance(value, Mapping) and keys <= value.keys():
            try:
                return Source(path.name, kind, convert(value))
            except msgspec.ValidationError as error:
                raise ReportError(
                    f"{path} is not the JSON of this version's {kind}: {error}; measure again"
                ) from error
    raise ReportError(f"{path} has no figures; expected the --json output of {_COMMANDS}")


def _files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*.json") if file.is_file())
    if not files:
        raise ReportError(f"{path} has no .json files; expected the --json output of {_COMMANDS}")
    return files


def _load(path: Path) -> Any:
    """lm_eval writes NaN, ours is null. Half a surrogate pair becomes a question mark."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ReportError(f"{path} has more than {_LARGEST >> 20} MiB; expected figures")
        value = json.loads(raw.decode(), parse_constant=lambda name: None)
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except OSError as error:
        raise ReportError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error


def _verified(value: Mapping[str, Any]) -> Verified:
    return Verified(*_with_subject(value, Verification))


def _evaluated(value: Mapping[str, Any]) -> Evaluated:
    return Evaluated(*_with_subject(value, Evaluation))


def _phone(value: Mapping[str, Any]) -> PhoneReport:
    return msgspec.convert(_with_nan(value), PhoneReport)


def _structured(value: Mapping[str, Any]) -> Structured:
    rates = msgspec.convert(value["rates"], tuple[StructuredRate, ...])
    return Structured(msgspec.convert(value, Subject), rates)


def _with_subject(value: Mapping[str, Any], kind: type[Any]) -> tuple[Subject, Any]:
    return msgspec.convert(value, Subject), msgspec.convert(_with_nan(value), kind)


def _with_nan(value: Any) -> Any:
    """Put NaN back where JSON has null: a broken model's figures, which a page must show."""
    if isinstance(value, Mapping):
        return {
            key: float("nan") if part is None and key in _NUMBERS else _with_nan(part)
            for key, part in value.items()
        }
    return [_with_nan(part) for part in value] if isinstance(value, list) else value


def _number_fields(*kinds: type[Any]) -> Iterator[str]:
    for kind in kinds:
        assert is_dataclass(kind)
        yield from (field.name for field in fields(kind) if field.type in (float, "float"))


_NUMBERS = frozenset(
    _number_fields(Agreement, WorstPosition, DivergenceFigures, Estimate, TextFigures)
)


def _plain(kind: type[Any]) -> Callable[[Mapping[str, Any]], Any]:
    return lambda value: msgspec.convert(value, kind)


# Command, fields that only its JSON has, and how it is read.
_KINDS: tuple[tuple[str, frozenset[str], Callable[[Mapping[str, Any]], Figures]], ...] = (
    ("verify", frozenset({"verdict", "lowering"}), _verified),
    ("eval", frozenset({"total", "texts"}), _evaluated),
    ("bench", frozenset({"bundles", "bandwidth_bytes_per_second"}), _plain(Benchmark)),
    ("bench --sustained", frozenset({"bundles", "sustained_minutes"}), _plain(Sustained)),
    ("inspect", frozenset({"bundles", "same_codes"}), _plain(Comparison)),
    ("compare", frozenset({"groups", "tasks", "only_a"}), _plain(RunComparison)),
    ("safety", frozenset({"openings", "prompts"}), _plain(SafetyComparison)),
    ("lm-eval", frozenset({"results", "configs", "config"}), _plain(TaskScores)),
    ("phone app", frozenset({"device", "codes_digest"}), _phone),
    ("structured.py", frozenset({"rates"}), _structured),
)
