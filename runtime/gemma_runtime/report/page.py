"""Renders the page. Its only HTML is in the templates, which escape every text."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jinja2
import msgspec

from gemma_runtime.errors import ReportError
from gemma_runtime.proof.safety import SafetyComparison
from gemma_runtime.report.chart import shape
from gemma_runtime.report.collected import Collected
from gemma_runtime.report.figures import Figures
from gemma_runtime.report.parts import Section
from gemma_runtime.report.sections.identity import identity, sizes
from gemma_runtime.report.sections.languages import languages
from gemma_runtime.report.sections.parity import parity
from gemma_runtime.report.sections.refusals import safety
from gemma_runtime.report.sections.reproduce import reproduce
from gemma_runtime.report.sections.speed import speed
from gemma_runtime.report.sections.structure import structure
from gemma_runtime.report.sections.summary import Card, cards, verdict_line
from gemma_runtime.report.sections.tasks import tasks
from gemma_runtime.staging import staged_file

_SECTIONS = (identity, parity, languages, tasks, structure, safety, speed, sizes, reproduce)


class Data(NamedTuple):
    """A data block of the page."""

    kind: str
    name: str
    json: str  # of `script_json`, which the template doesn't escape again


def render_page(collected: Collected) -> bytes:
    """The page as UTF-8. The same figures give the same bytes."""
    return render_sections(
        title=", ".join(column.label for column in collected.columns),
        verdict=verdict_line(collected),
        cards=cards(collected),
        sections=[section(collected) for section in _SECTIONS],
        data=list(_data(collected)),
        generator="gemma-runtime report",
    )


def render_sections(
    *,
    title: str,
    verdict: str,
    cards: Sequence[Card],
    sections: Sequence[Section],
    data: Sequence[Data],
    generator: str,
) -> bytes:
    """A page of sections as UTF-8. `generator` is the command that writes it."""
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            verdict=verdict,
            cards=cards,
            sections=sections,
            data=data,
            generator=generator,
        )
    )
    return page.encode("utf-8", "replace")  # file names can have half a surrogate pair


def check_output(path: Path) -> None:
    """Raise ReportError unless a page can be written there. An existing file is replaced."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir():
        found = "a folder" if path.is_dir() else f"below {above}, which is a file"
        raise ReportError(f"{path} is {found}; give a file for the page, such as report.html")
    if not os.access(above, os.W_OK):
        raise ReportError(f"can't write into {above}: permission denied")


def write_page(path: Path, page: bytes) -> None:
    try:
        with staged_file(path) as partial:
            partial.write_bytes(page)
    except OSError as error:
        raise ReportError(f"can't write {path}: {error.strerror}") from error


def page_environment(package: str) -> jinja2.Environment:
    """An environment with a package's templates, which escape every text and know every name."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _environment() -> jinja2.Environment:
    environment = page_environment("gemma_runtime.report")
    environment.tests["part"] = lambda part, name: type(part).__name__ == name
    environment.globals["shape"] = shape
    return environment


def _data(collected: Collected) -> Iterator[Data]:
    for source in collected.sources:
        yield Data(source.kind, source.name, script_json(_shared(source.figures)))


def _shared(figures: Figures) -> Figures:
    """Figures that may be shown to anybody: without what a model replied to harmful prompts."""
    if not isinstance(figures, SafetyComparison):
        return figures
    prompts = [replace(prompt, reply_a=None, reply_b=None) for prompt in figures.prompts]
    return replace(figures, prompts=tuple(prompts))


def script_json(value: object) -> str:
    """JSON that can stand in a script element: no `<`, so nothing ends the element or opens one."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
