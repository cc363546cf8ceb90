"""Assigns figures to the bundles of the page."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.inspection import Comparison
from gemma_runtime.errors import ReportError
from gemma_runtime.measure.bench import Benchmark
from gemma_runtime.measure.sustained import Sustained
from gemma_runtime.proof.compare_runs import RunComparison
from gemma_runtime.proof.safety import SafetyComparison
from gemma_runtime.report.figures import (
    Evaluated,
    Figures,
    Source,
    Structured,
    TaskScores,
    Verified,
)
from gemma_runtime.report.phone import PhoneReport

T = TypeVar("T")

_COLORS = 6
_ELSEWHERE = "other"


@dataclass(frozen=True, slots=True)
class Column:
    """A bundle of the page."""

    label: str
    index: int
    bundle: Bundle
    digest: str

    @property
    def style(self) -> str:
        return f"s{self.index % _COLORS}"

    @property
    def shape(self) -> int:
        return self.index


@dataclass(frozen=True, slots=True)
class Collected:
    """The bundles, and all that is known about them."""

    columns: tuple[Column, ...]
    sources: tuple[Source, ...]

    def verified(self) -> dict[str, Verified]:
        return {one.subject.digest: one for one in self.all_of(Verified)}

    def evaluated(self) -> dict[str, Evaluated]:
        return {one.subject.digest: one for one in self.all_of(Evaluated)}

    def structured(self) -> dict[str, Structured]:
        return {one.subject.digest: one for one in self.all_of(Structured)}

    def scores(self) -> dict[str, list[TaskScores]]:
        found: dict[str, list[TaskScores]] = {}
        for one in self.all_of(TaskScores):
            found.setdefault(one.config.bundle_digest or "", []).append(one)
        return found

    def held_codes(self) -> dict[str, str | None]:
        """Codes that `inspect` read back from the files, by the bundle's digest."""
        return {
            column.digest: inspection.codes_held
            for comparison in self.all_of(Comparison)
            for inspection in comparison.bundles
            for column in self.columns
            if inspection.manifest == column.bundle.manifest
        }

    def all_of(self, kind: type[T]) -> list[T]:
        return [source.figures for source in self.sources if isinstance(source.figures, kind)]

    def column(self, digest: str) -> Column | None:
        return next((column for column in self.columns if column.digest == digest), None)

    def name(self, digest: str, given: str) -> str:
        """What the page calls a model: its column's label if it has one."""
        column = self.column(digest)
        if column is None:
            return given
        return column.label + (" (exact graph)" if given.endswith(" (exact graph)") else "")

    def style(self, digest: str) -> tuple[str, int]:
        """Colour and shape."""
        column = self.column(digest)
        return (_ELSEWHERE, 0) if column is None else (column.style, column.shape)


def collect(bundles: Sequence[Bundle], sources: Sequence[Source]) -> Collected:
    """Raises ReportError for figures of other bundles, and for two of one kind about one bundle."""
    digests = [bundle.digest() for bundle in bundles]
    for bundle, digest in zip(bundles, digests, strict=True):
        if digests.count(digest) > 1:
            raise ReportError(f"{bundle.directory} is there twice; give each bundle once")
    columns = tuple(
        Column(label, index, bundle, digest)
        for index, (label, bundle, digest) in enumerate(
            zip(_labels(bundles), bundles, digests, strict=True)
        )
    )
    collected = Collected(columns, tuple(sources))
    _check_known(collected)
    _check_once(collected)
    return collected


def subjects(figures: Figures) -> Iterator[tuple[str, str]]:
    """Digest and name of each model that the figures are about."""
    match figures:
        case Verified() | Evaluated() | Structured():
            yield figures.subject.digest, figures.subject.bundle
        case Benchmark() | Sustained():
            yield from ((one.digest, one.bundle) for one in figures.bundles)
        case RunComparison():
            yield from ((figures.artifact_a, figures.a), (figures.artifact_b, figures.b))
        case SafetyComparison():
            yield from ((figures.digest_a, figures.a), (figures.digest_b, figures.b))
        case TaskScores():
            config = figures.config
            yield config.bundle_digest or "", config.bundle or "a model that is no bundle"
        case PhoneReport():
            yield figures.digest, figures.bundle
        case Comparison():
            pass


def _labels(bundles: Sequence[Bundle]) -> list[str]:
    """Folder names; whole paths where names repeat."""
    names = [bundle.directory.resolve().name for bundle in bundles]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else str(bundle.directory)
        for name, bundle in zip(names, bundles, strict=True)
    ]


def _check_known(collected: Collected) -> None:
    known = {column.digest for column in collected.columns}
    for source in collected.sources:
        found = dict(subjects(source.figures))
        is_inspection = isinstance(source.figures, Comparison)
        if (found and not known & found.keys()) or (
            is_inspection and not _inspects(collected, source.figures)
        ):
            names = ", ".join(found.values()) or "other bundles"
            raise ReportError(
                f"{source.name} is about {names}, not about {_join(collected)}; if a bundle was "
                "exported again since, measure again"
            )


def _inspects(collected: Collected, figures: Figures) -> bool:
    manifests = [column.bundle.manifest for column in collected.columns]
    return isinstance(figures, Comparison) and any(
        inspection.manifest in manifests for inspection in figures.bundles
    )


def _check_once(collected: Collected) -> None:
    seen: dict[tuple[str, str], str] = {}
    for source in collected.sources:
        if isinstance(source.figures, Verified | Evaluated | Structured):
            key = (source.kind, source.figures.subject.digest)
            if key in seen:
                raise ReportError(
                    f"{seen[key]} and {source.name} are both {source.kind}'s figures of "
                    f"{source.figures.subject.bundle}; give one of them"
                )
            seen[key] = source.name


def _join(collected: Collected) -> str:
    return ", ".join(str(column.bundle.directory) for column in collected.columns)
