"""Draws values over time as lines, one below the other, for the page's template."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemma_runtime.report.chart import WIDTH, Chart, Mark
from gemma_runtime.report.scale import Scale, linear

_LEFT, _RIGHT = 190, 26  # widths
_HEAD, _LINES, _GAP, _FOOT = 24, 90, 14, 24  # heights: of a curve its title and its lines


@dataclass(frozen=True, slots=True)
class Line:
    style: str  # CSS class of its colour
    points: tuple[tuple[float, float], ...]  # seconds, value
    tip: str


@dataclass(frozen=True, slots=True)
class Curve:
    """Lines on one axis, which begins at 0."""

    title: str
    lines: tuple[Line, ...]
    written: Callable[[float], str]  # the numbers at its axis


@dataclass(frozen=True, slots=True)
class Note:
    """What was said at a time, below the curves."""

    seconds: float
    text: str


def draw_curves(name: str, curves: Sequence[Curve], notes: Sequence[Note] = ()) -> Chart:
    times = [seconds for curve in curves for line in curve.lines for seconds, _ in line.points]
    time = linear([*times, *(note.seconds for note in notes)])
    marks, top = [], 0.0
    for curve in curves:
        marks += _curve(curve, time, top)
        top += _HEAD + _LINES + _GAP
    for seconds in time.lines():
        marks.append(_text(_x(time, seconds), top + 4, f"{seconds:g} s", "tick", "middle"))
    for note in notes:
        marks.append(_text(_x(time, note.seconds), top + _FOOT, note.text, "tick", "middle"))
    return Chart(name, WIDTH, round(top + _FOOT + (_GAP if notes else 0)), tuple(marks))


def _curve(curve: Curve, time: Scale, top: float) -> list[Mark]:
    values = linear([value for line in curve.lines for _, value in line.points])
    marks = [_text(_LEFT, top + 13, curve.title, "title")]

    def y(value: float) -> float:
        return top + _HEAD + _LINES * (1 - values.place(value))

    for value in values.lines():
        style = "zero" if value == 0 else "grid"
        ends = {"x": f"{_LEFT}", "x2": f"{WIDTH - _RIGHT}"}
        marks.append(Mark("line", style, y=f"{y(value):.1f}", y2=f"{y(value):.1f}", **ends))
        marks.append(_text(_LEFT - 8, y(value) + 4, curve.written(value), "tick", "end"))
    for line in curve.lines:
        corners = [f"{_x(time, seconds):.1f} {y(value):.1f}" for seconds, value in line.points]
        path = "M" + "L".join(corners if len(corners) > 1 else corners * 2)
        marks.append(Mark("path", f"{line.style} curve", line.tip, path=path))
    return marks


def _x(time: Scale, seconds: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * time.place(seconds)


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> Mark:
    return Mark("text", style, "", text, anchor, f"{x:.1f}", f"{y:.1f}")
