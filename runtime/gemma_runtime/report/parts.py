"""What a section of the page is made of."""

from dataclasses import dataclass

from gemma_runtime.report.chart import Chart


@dataclass(frozen=True, slots=True)
class TableRow:
    label: str
    cells: tuple[str, ...]
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of numbers under a head. The first column has the labels."""

    head: tuple[str, ...]
    rows: tuple[TableRow, ...]
    title: str = ""
    note: str = ""
    wraps: bool = False  # cells of text, not of numbers


@dataclass(frozen=True, slots=True)
class Warning:
    text: str


@dataclass(frozen=True, slots=True)
class Commands:
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """What a colour and shape mean."""

    label: str
    style: str
    shape: int


@dataclass(frozen=True, slots=True)
class Legend:
    keys: tuple[Key, ...]


Part = Table | Chart | Warning | Commands | Legend


@dataclass(frozen=True, slots=True)
class Section:
    name: str  # its anchor
    title: str
    lead: str  # what the reader sees here, and how it was measured
    parts: tuple[Part, ...]
    missing: str = ""  # the command that makes it


def missing(name: str, title: str, command: str) -> Section:
    return Section(name, title, "", (), command)
