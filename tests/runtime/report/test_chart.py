import math
from itertools import pairwise

import pytest

from gemma_runtime.report.chart import Chart, Form, Panel, Row, Value, draw, shape
from gemma_runtime.report.scale import SHARE, Scale, decades, linear


@pytest.mark.parametrize(
    "values",
    [[3.0, 4.0], [-3.0, -2.0], [-1.0, 5.0], [0.0], [], [1e-9], [1e12, 3.0], [math.nan, 7.0]],
)
def test_a_linear_axis_always_has_zero_and_all_values(values: list[float]) -> None:
    """A bar on a cut axis would show a small difference as a large one."""
    scale = linear(values)
    assert scale.low <= 0 <= scale.high
    assert scale.low < scale.high
    assert all(scale.low <= value <= scale.high for value in values if math.isfinite(value))
    assert 0 in scale.lines()


def test_linear_lines_are_round_and_few() -> None:
    assert linear([87.0]).lines() == [0, 20, 40, 60, 80, 100]
    assert linear([-0.03, 0.05]).low == pytest.approx(-0.04)
    assert all(2 <= len(linear([10.0**power]).lines()) <= 7 for power in range(-9, 12))


def test_decades_end_at_powers_of_ten_and_take_zero() -> None:
    scale = decades([0.0, 0.0023, 5.8])
    assert (scale.low, scale.high) == (0.001, 10.0)
    assert scale.place(0.0) == 0
    assert scale.place(10.0) == 1
    assert scale.place(0.1) == pytest.approx(0.5)
    assert scale.lines() == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert decades([0.002, 0.003]).lines() == pytest.approx([0.001, 0.002, 0.005, 0.01])


@pytest.mark.parametrize("values", [[], [0.0], [math.nan, math.inf], [1e-300, 1.0], [1.0, 1.0]])
def test_decades_of_anything_are_an_axis(values: list[float]) -> None:
    scale = decades(values)
    assert 0 < scale.low < scale.high
    assert len(scale.lines()) <= 13


def test_a_bar_begins_at_zero_in_both_directions() -> None:
    scale = Scale(-1.0, 1.0)
    chart = _chart(Form.BARS, scale, Value(-0.5, "", "lost"), Value(0.25, "", "won"))
    left, right = (mark for mark in chart.marks if mark.tag == "rect")
    (zero,) = (mark for mark in chart.marks if mark.style == "zero")
    assert float(left.x) + float(left.x2) == pytest.approx(float(zero.x), abs=0.11)
    assert float(right.x) == pytest.approx(float(zero.x), abs=0.11)
    assert float(left.x2) == pytest.approx(2 * float(right.x2), abs=0.11)


def test_an_interval_is_a_line_around_its_dot() -> None:
    chart = _chart(Form.DOTS, SHARE, Value(0.5, "half", "s0", 0.25, 0.75))
    (line,) = (mark for mark in chart.marks if "range" in mark.style)
    (dot,) = (mark for mark in chart.marks if mark.tag == "path")
    assert float(line.x) < float(dot.path[1:].split()[0]) < float(line.x2)
    assert dot.tip == "half"


def test_a_value_that_is_no_number_is_written_not_drawn() -> None:
    chart = _chart(Form.DOTS, SHARE, Value(math.nan, "broken", "s0"))
    assert [mark.text for mark in chart.marks if mark.tip == "broken"] == ["not a number"]
    assert "nan" not in str(chart.marks).lower().replace("not a number", "")


def test_stacked_bars_follow_one_another() -> None:
    values = [Value(0.25, "", "p0"), Value(0.5, "", "p1")]
    first, second = (m for m in _chart(Form.STACK, SHARE, *values).marks if m.tag == "rect")
    assert float(first.x) + float(first.x2) == pytest.approx(float(second.x), abs=0.11)


def test_a_long_label_is_cut_and_whole_in_its_tooltip() -> None:
    row = Row("x" * 300, ((),))
    chart = draw("", [Panel("", Form.DOTS, SHARE, str)], [row])
    (label,) = (mark for mark in chart.marks if mark.style == "label")
    assert (len(label.text), label.tip) == (26, "x" * 300)


def test_numbers_of_a_narrow_axis_do_not_overlap() -> None:
    panel = Panel("", Form.DOTS, decades([1e-10, 9.0]), "{:.0e}".format)
    wide, narrow = draw("", [panel], []), draw("", [panel] * 4, [])
    for chart, lines in ((wide, 12), (narrow, 4 * 12)):
        assert sum(mark.style == "grid" for mark in chart.marks) == lines
        numbers = [mark for mark in chart.marks if mark.style == "tick"]
        assert len(numbers) >= 8
        for left, right in pairwise(numbers):
            apart = float(right.x) - float(left.x)
            assert apart >= 6 * len(left.text)
    assert sum(mark.style == "tick" for mark in wide.marks) == 12


def test_four_shapes_are_different_and_come_again() -> None:
    shapes = [shape(index, 10.0, 10.0) for index in range(5)]
    assert len(set(shapes)) == 4
    assert shapes[0] == shapes[4]


def _chart(form: Form, scale: Scale, *values: Value) -> Chart:
    return draw("", [Panel("", form, scale, str)], [Row("row", (values,))])
