"""Runs blocks of rows in parallel, one per core.

torch's own threads synchronize after every operation. With thousands of small operations on a busy
machine that costs many times the work itself. Here each worker runs all operations of one block,
and torch uses a single thread.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


_workers: ContextVar[int | None] = ContextVar("workers", default=None)  # None: one per core


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` on all cores, in order; holds at most one unread result per core."""
    count = _workers.get() or os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(_pool(count).submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def workers(count: int) -> Iterator[None]:
    """Let `in_order` use this many threads instead of one per core."""
    token = _workers.set(count)
    try:
        yield
    finally:
        _workers.reset(token)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Limit torch to one thread in the calling thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
