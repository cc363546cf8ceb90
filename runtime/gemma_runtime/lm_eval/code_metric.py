"""lm_eval's metric `code_eval` without the network, in a process that can do little."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class CodeMetric:
    isolation: str | None = None


@contextmanager
def replaced_code_metric(allowed: bool) -> Iterator[CodeMetric]:
    yield CodeMetric()
