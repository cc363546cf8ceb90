"""Draws cells as dots in a plane of two objectives, with the front as a line, in SVG elements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gemma_export.search.judge import Result, State
from gemma_export.search.measures import MEASURES, told, value_of
from gemma_export.search.pareto import front
from gemma_runtime.report.chart import WIDTH, Chart, Mark, shape
from gemma_runtime.report.scale import Scale, decades, linear
from gemma_runtime.report.wording import number

_LEFT, _RIGHT, _TOP, _BOTTOM = 90.0, 880.0, 30.0, 370.0
_HEIGHT = 420
_SPREAD = 20.0  # largest over smallest value from which on an axis is logarithmic
# Style and shape of a dot: no two states differ by colour alone.
DOTS = {
    State.TAKE: ("s2", 2),
    State.FRONT: ("s0", 0),
    State.DOMINATED: ("other", 1),
    State.OVER: ("s4", 3),
}


@dataclass(frozen=True, slots=True)
class _Axis:
    name: str
    scale: Scale

    def place(self, result: Result) -> float:
        """Where the result lies between the ends: 0 to 1."""
        return self.scale.place(_of(result, self.name) * MEASURES[self.name].scale)

    @property
    def title(self) -> str:
        measure = MEASURES[self.name]
        return f"{measure.title}, {measure.unit}" if measure.unit else measure.title


def scatter(results: Sequence[Result], names: Mapping[str, str], across: str, up: str) -> Chart:
    """Cells, with the names to call them by, by two measures that all of them have."""
    x, y = _axis(results, across), _axis(results, up)
    marks = [*_grid(x, y), *_line(results, x, y)]
    for result in results:
        left, top = _point(result, x, y)
        style, form = DOTS[result.state]
        assert result.figures is not None  # only measured cells are drawn
        both = f"{told(across, result.figures)}, {told(up, result.figures)}"
        tip = f"{names[result.name]}: {both}, {result.state}"
        marks.append(Mark("path", f"{style} dot", tip, path=shape(form, left, top)))
    name = f"{MEASURES[up].title} over {MEASURES[across].title}"
    return Chart(name, WIDTH, _HEIGHT, tuple(marks))


def _of(result: Result, name: str) -> float:
    value = None if result.figures is None else value_of(result.figures, name)
    assert value is not None  # only measured cells are drawn
    return value


def _axis(results: Sequence[Result], name: str) -> _Axis:
    values = [_of(result, name) * MEASURES[name].scale for result in results]
    is_wide = min(values) > 0 and max(values) > _SPREAD * min(values)
    return _Axis(name, decades(values) if is_wide else linear(values))


def _point(result: Result, x: _Axis, y: _Axis) -> tuple[float, float]:
    return _across(x.place(result)), _up(y.place(result))


def _across(share: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * share


def _up(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * share


def _grid(x: _Axis, y: _Axis) -> list[Mark]:
    marks = [
        Mark("text", "title", text=y.title, x=_n(8), y=_n(14)),
        Mark("text", "title", text=x.title, anchor="end", x=_n(_RIGHT), y=_n(_BOTTOM + 40)),
    ]
    for value in x.scale.lines():
        at = _n(_across(x.scale.place(value)))
        marks.append(Mark("line", "grid", x=at, y=_n(_TOP), x2=at, y2=_n(_BOTTOM)))
        text = number(value, "g")
        marks.append(Mark("text", "tick", text=text, anchor="middle", x=at, y=_n(_BOTTOM + 18)))
    for value in y.scale.lines():
        top = _up(y.scale.place(value))
        marks.append(Mark("line", "grid", x=_n(_LEFT), y=_n(top), x2=_n(_RIGHT), y2=_n(top)))
        text = number(value, "g")
        marks.append(Mark("text", "tick", text=text, anchor="end", x=_n(_LEFT - 8), y=_n(top + 4)))
    return marks


def _line(results: Sequence[Result], x: _Axis, y: _Axis) -> list[Mark]:
    """The front of these two measures alone, as steps: what lies behind it is worse in both."""
    inside = [one for one in results if one.state is not State.OVER]
    vectors = [
        tuple(MEASURES[axis.name].oriented(_of(one, axis.name)) for axis in (x, y))
        for one in inside
    ]
    points = sorted({_point(inside[index], x, y) for index in front(vectors)})
    if len(points) < 2:
        return []
    path = f"M{_n(points[0][0])} {_n(points[0][1])}"
    is_high = MEASURES[x.name].is_better_high
    for (before, top), (left, now) in pairwise(points):
        corner = (before, now) if is_high else (left, top)
        path += f"L{_n(corner[0])} {_n(corner[1])}L{_n(left)} {_n(now)}"
    return [Mark("path", "front", path=path)]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
