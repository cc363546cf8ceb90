import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
from rich.console import Console

from gemma_runtime.bundle import Bundle
from gemma_runtime.cli import run_command
from gemma_runtime.machine import processor_celsius
from gemma_runtime.measure.bench_worker import Workload
from gemma_runtime.measure.sustained import (
    SPAN_SECONDS,
    Span,
    Sustained,
    measure_sustained,
    render_sustained,
    sustain,
)
from gemma_runtime.session import FakeSession, Logits
from tests.data.sustained_vectors import VECTORS, vectors
from tests.runtime.real_bundles import export_random


def test_the_phone_apps_reproduce_these_spans() -> None:
    """Kotlin and Swift read the same file."""
    assert json.loads(VECTORS.read_text("utf-8")) == vectors()


WORKLOAD = Workload(threads=1, prompt_lengths=(4,), decode_prompt=6, new_tokens=10)


class Slow(FakeSession):
    """A session whose steps take time: `pace` maps the seconds so far to those of a new token."""

    def __init__(self, pace: Callable[[float], float]) -> None:
        super().__init__(lambda tokens: np.eye(16, dtype=np.float32)[3], context_length=16)
        self._pace = pace
        self.now = 0.0
        self.prompts = 0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        if len(tokens) > 1:
            self.prompts += 1
            self.now += 0.5
        else:
            self.now += self._pace(self.now)
        return super().prefill(tokens)


def run(session: Slow, seconds: float) -> tuple[int, tuple[Span, ...]]:
    return sustain(
        session,
        16,
        WORKLOAD,
        seconds,
        clock=lambda: session.now,
        celsius=lambda: 40 + session.now,
    )


def test_rates_are_of_new_tokens_without_the_time_of_prompts() -> None:
    session = Slow(lambda now: 0.125)
    count, spans = run(session, 60)
    assert {span.tokens_per_second for span in spans} == {8}
    assert len(spans) in (11, 12)
    assert session.prompts == 1 + -(-count // 10)  # and the untimed one


def test_a_machine_that_slows_down_is_seen() -> None:
    _, spans = run(Slow(lambda now: 0.125 if now < 30 else 0.25), 60)
    assert (spans[0].tokens_per_second, spans[-1].tokens_per_second) == (8, 4)
    assert spans[-1].celsius == pytest.approx(40 + 0.5 + spans[-1].seconds)


def test_rounds_fit_the_context_however_long_it_takes() -> None:
    count, _ = run(Slow(lambda now: 0.01), 30)
    assert count > 16


def test_spans_are_told_when_they_end() -> None:
    session = Slow(lambda now: 0.125)
    told: list[Span] = []
    sustain(session, 16, WORKLOAD, 21, clock=lambda: session.now, on_span=told.append)
    assert len(told) in (3, 4)
    lengths = np.diff([0, *(span.seconds for span in told)])
    assert lengths.min() >= SPAN_SECONDS
    assert lengths.max() < SPAN_SECONDS + 1


def test_a_short_rest_is_not_a_span_unless_it_is_all() -> None:
    _, short = run(Slow(lambda now: 0.125), 2)
    assert len(short) == 1
    _, rest = run(Slow(lambda now: 0.125), 6.5)
    assert len(rest) == 1
    _, half = run(Slow(lambda now: 0.125), 9)
    assert len(half) == 2


@pytest.mark.parametrize(
    ("sensors", "expected"),
    [
        ({"coretemp": [51.0, 63.5], "nvme": [70.0]}, 63.5),
        ({"nvme": [40.0], "acpitz": [33.0]}, 40.0),
        ({"cpu_thermal": [0.0]}, None),
        ({}, None),
    ],
)
def test_the_hottest_sensor_of_the_processor_is_told(
    monkeypatch: pytest.MonkeyPatch, sensors: dict[str, list[float]], expected: float | None
) -> None:
    found = {
        name: [SimpleNamespace(current=celsius) for celsius in readings]
        for name, readings in sensors.items()
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    assert processor_celsius() == expected


def test_a_system_without_sensors_tells_no_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    assert processor_celsius() is None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    return export_random(tmp_path_factory.mktemp("sustained") / "export", tokenizer_path)


@pytest.mark.serial
def test_bundles_are_measured_one_after_the_other(bundle: Bundle) -> None:
    told: list[str] = []
    found = measure_sustained(
        [bundle.directory] * 2, minutes=0.01, threads=1, new_tokens=8, on_progress=told.append
    )
    assert told == [str(bundle.directory)] * 2
    assert "later bundles start on a machine" in found.warnings[-1]
    for one in found.bundles:
        assert one.new_tokens > 8
        assert 0 < one.lowest <= min(one.first, one.last)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Sustained) == found
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(render_sustained(found))
    assert "last / first" in capture.get()
    assert "rounds of 56 prompt and 8 new tokens" in capture.get()


@pytest.mark.serial
def test_the_command_prints_figures(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(bundle.directory), "--sustained", "0.01", "--threads", "1", "--json"]
    assert run_command([*arguments, "--new-tokens", "8"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sustained_minutes"] == 0.01
    assert run_command([*arguments, "--profile"]) == 2
