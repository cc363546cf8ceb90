"""Reports the progress of long-running work: stage, tensor, bytes done, memory peak."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gemma_export.memory import MemoryCeiling
from gemma_runtime.machine import format_bytes, peak_rss_bytes

Tick = Callable[[str, int], None]  # (tensor name, bytes done since the last tick)
Stage = Callable[[str, int], AbstractContextManager[Tick]]  # (title, total bytes)
Note = Callable[[str], None]  # shows a message to the user


def unheard(name: str, done: int) -> None:
    """A tick that does nothing."""
    del name, done


def silent(text: str) -> None:
    """A note that shows nothing."""
    del text


class Reporter(Protocol):
    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Tick]:
        """Run one stage of the work; it calls the tick after every block."""
        ...

    def note(self, text: str) -> None:
        """Show a message to the user."""
        ...


class QuietReporter:
    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Tick]:
        yield unheard

    def note(self, text: str) -> None:
        del text


class ConsoleReporter:
    """A progress bar per stage on stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Tick]:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left", style="dim"),
            TextColumn("peak {task.fields[peak]}"),
            TextColumn("{task.fields[tensor]}", style="dim"),
        )
        # Averages the speed over minutes, because one layer can take that long.
        with Progress(*columns, console=self._console, speed_estimate_period=300) as bar:
            task = bar.add_task(title, total=total_bytes, tensor="", peak="")

            def tick(name: str, done: int) -> None:
                peak = format_bytes(peak_rss_bytes())
                bar.update(task, advance=done, tensor=_short(name), peak=peak)

            yield tick
            bar.update(task, completed=total_bytes, tensor="")

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", highlight=False)


def guarded_stage(report: Reporter, ceiling: MemoryCeiling) -> Stage:
    """The reporter's stages, with ticks that raise MemoryLimit above the ceiling."""

    @contextmanager
    def stage(title: str, total_bytes: int) -> Iterator[Tick]:
        with report.stage(title, total_bytes) as tick:
            yield guarded(tick, ceiling)

    return stage


def guarded(tick: Tick, ceiling: MemoryCeiling) -> Tick:
    """A tick that raises MemoryLimit if memory is above the ceiling, else calls `tick`."""

    def checked(name: str, done: int) -> None:
        ceiling.check_peak()
        tick(name, done)

    return checked


def _short(name: str) -> str:
    """A tensor's name, shortened; for several stacked tensors, the first one's."""
    return name.split("+")[0].removeprefix("model.").removesuffix(".weight")
