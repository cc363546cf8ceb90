"""Draws rows of dots and bars as SVG elements, which the page's template writes and escapes.

A chart has rows, and panels side by side. Each panel has an axis of its own. Bars begin at 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gemma_runtime.report.scale import Scale

WIDTH = 920
_LABEL, _GAP, _RIGHT = 190, 34, 26  # widths
_HEAD, _FOOT = 26, 22  # heights
_LONGEST = 26  # characters of a label
_STRIPE = 13  # height of one series in a row
_PADDING = 9  # between rows
_BAR, _DOT = 9.0, 4.2
_CHARACTER, _APART = 6.5, 4.0  # widths: of a number's character, and between two numbers
_SHAPES = 4  # circle, square, diamond, triangle


class Form(StrEnum):
    DOTS = "dots"  # with the line of their interval
    BARS = "bars"  # from 0, with the line of their interval
    STACK = "stack"  # bars one after the other


@dataclass(frozen=True, slots=True)
class Value:
    """One value in a row. Its interval may be unknown."""

    value: float
    tip: str  # what it says in words, for a tooltip
    style: str  # CSS class of its colour
    low: float | None = None
    high: float | None = None
    stripe: int = 0  # its line in the row
    shape: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    cells: tuple[tuple[Value, ...], ...]  # for each panel
    quiet: bool = False  # a row to compare with, such as noise


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    form: Form
    scale: Scale
    written: Callable[[float], str]  # the numbers at its axis
    share: float = 1.0  # of the width


@dataclass(frozen=True, slots=True)
class Mark:
    """One SVG element. `tag` says which of the numbers it has."""

    tag: str  # line, rect, path, text
    style: str
    tip: str = ""
    text: str = ""
    anchor: str = "start"
    x: str = ""
    y: str = ""
    x2: str = ""  # of a line; of a rect: its width
    y2: str = ""  # of a line; of a rect: its height
    path: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    name: str  # for readers who don't see it
    width: int
    height: int
    marks: tuple[Mark, ...]


def draw(name: str, panels: Sequence[Panel], rows: Sequence[Row]) -> Chart:
    spans = _spans(panels)
    marks: list[Mark] = []
    tops, top = [], float(_HEAD)
    for row in rows:
        tops.append(top)
        top += _height(row)
    for panel, span in zip(panels, spans, strict=True):
        marks += _axis(panel, span, top)
    for row, y in zip(rows, tops, strict=True):
        marks += _row(row, y, panels, spans)
    return Chart(name, WIDTH, round(top + _FOOT), tuple(marks))


_Span = tuple[float, float]  # left and right end of a panel


def _spans(panels: Sequence[Panel]) -> list[_Span]:
    free = WIDTH - _LABEL - _RIGHT - _GAP * (len(panels) - 1)
    total = sum(panel.share for panel in panels)
    spans, left = [], float(_LABEL)
    for panel in panels:
        right = left + free * panel.share / total
        spans.append((left, right))
        left = right + _GAP
    return spans


def _stripes(row: Row) -> int:
    return 1 + max((value.stripe for cell in row.cells for value in cell), default=0)


def _height(row: Row) -> float:
    return _PADDING + _STRIPE * _stripes(row)


def _axis(panel: Panel, span: _Span, bottom: float) -> list[Mark]:
    marks, free = [_text(span[0], 13, panel.title, "title")], -math.inf
    for value in panel.scale.lines():
        x = _x(panel.scale, span, value)
        style = "zero" if value == 0 else "grid"
        marks.append(Mark("line", style, x=_n(x), y=_n(_HEAD - 4), x2=_n(x), y2=_n(bottom)))
        written = panel.written(value)
        half = len(written) * _CHARACTER / 2
        if x - half >= free:  # else it would lie on the number before
            marks.append(_text(x, bottom + 15, written, "tick", "middle"))
            free = x + half + _APART
    return marks


def _row(row: Row, top: float, panels: Sequence[Panel], spans: Sequence[_Span]) -> list[Mark]:
    middle = top + _height(row) / 2
    short = row.label if len(row.label) <= _LONGEST else row.label[: _LONGEST - 1] + "…"
    tip = row.label if short != row.label else ""
    style = "label quiet" if row.quiet else "label"
    marks = [_text(_LABEL - 12, middle + 4, short, style, "end", tip)]
    for panel, span, cell in zip(panels, spans, row.cells, strict=True):
        marks += _stack(panel, span, cell, middle) if panel.form is Form.STACK else []
        for value in cell if panel.form is not Form.STACK else ():
            y = top + _PADDING / 2 + _STRIPE * (value.stripe + 0.5)
            marks += _value(panel, span, value, y)
    return marks


def _value(panel: Panel, span: _Span, value: Value, y: float) -> list[Mark]:
    if not math.isfinite(value.value):
        return [_text(span[0], y + 4, "not a number", f"{value.style} lost", "start", value.tip)]
    x, marks = _x(panel.scale, span, value.value), []
    if panel.form is Form.BARS:
        zero = _x(panel.scale, span, 0.0)
        marks.append(_bar(min(x, zero), abs(x - zero), y, value))
    if value.low is not None and value.high is not None:
        ends = [_x(panel.scale, span, end) for end in (value.low, value.high)]
        style = f"{'whisker' if panel.form is Form.BARS else value.style} range"
        line = Mark("line", style, value.tip, x=_n(ends[0]), y=_n(y), x2=_n(ends[1]), y2=_n(y))
        marks.append(line)
    if panel.form is Form.DOTS:
        path = shape(value.shape, x, y)
        marks.append(Mark("path", f"{value.style} dot", value.tip, path=path))
    return marks


def _stack(panel: Panel, span: _Span, cell: Sequence[Value], y: float) -> list[Mark]:
    marks, before = [], 0.0
    for value in cell:
        left, right = (_x(panel.scale, span, x) for x in (before, before + value.value))
        marks.append(_bar(left, right - left, y, value))
        before += value.value
    return marks


def _bar(x: float, width: float, y: float, value: Value) -> Mark:
    return Mark(
        "rect",
        f"{value.style} bar",
        value.tip,
        x=_n(x),
        y=_n(y - _BAR / 2),
        x2=_n(max(width, 0.0)),
        y2=_n(_BAR),
    )


def shape(index: int, x: float, y: float) -> str:
    """The path of a dot. Its shape tells bundles apart without colours."""
    r, index = _DOT, index % _SHAPES
    if index == 0:
        return f"M{_n(x - r)} {_n(y)}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    corners = (
        ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        ((0, -1.2), (1.1, 0.85), (-1.1, 0.85)),
    )[index - 1]
    return "M" + "L".join(f"{_n(x + r * dx)} {_n(y + r * dy)}" for dx, dy in corners) + "z"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start", tip: str = "") -> Mark:
    return Mark("text", style, tip, text, anchor, _n(x), _n(y))


def _x(scale: Scale, span: _Span, value: float) -> float:
    if math.isnan(value):
        return span[0]
    return span[0] + (span[1] - span[0]) * scale.place(value)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
