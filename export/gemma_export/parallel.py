"""All cores, a block to each.

torch's own threads meet at a barrier after every operation: for thousands of small operations on a
machine with anything else to do that costs many times the work itself. Here each worker takes a
whole block of rows through all of its operations, and torch is told to stay on one thread.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` on all cores, with no more results waiting than there are cores."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(_pool().submit(function, item))
        if len(waiting) > _cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep torch on one thread in the calling thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), initializer=torch.set_num_threads, initargs=(1,))
