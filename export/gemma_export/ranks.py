"""The processes that torchrun starts, its ranks: who this one is. Imports no torch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from gemma_runtime.errors import RankError

# Seconds that a failed rank stays: torchrun ends all others once one is gone, and the first must
# have printed why.
_GRACE = 20


def count_ranks() -> int:
    """How many processes torchrun started; 1 without it."""
    return _told("WORLD_SIZE", 1)


def own_rank() -> int:
    """0 is the first: it prints and writes."""
    return _told("RANK", 0)


def local_rank() -> int:
    """The rank among those of this machine."""
    return _told("LOCAL_RANK", 0)


def count_local_ranks() -> int:
    """How many of them are on this machine."""
    return _told("LOCAL_WORLD_SIZE", 1)


def refuse_ranks(what: str) -> None:
    """Raise RankError if several ranks would all do this."""
    if (count := count_ranks()) > 1:
        raise RankError(f"{what} is not shared among ranks, found {count}; run it without torchrun")


@contextmanager
def first_prints() -> Iterator[None]:
    """Let only the first rank print."""
    if own_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        yield


def stay_if_failed(code: int) -> None:
    """Keep another rank than the first for a while if it failed, until torchrun ends it."""
    if code in (1, 2) and own_rank():  # 130 is Ctrl-C
        time.sleep(_GRACE)


def _told(name: str, alone: int) -> int:
    """What torchrun says; `alone` without it."""
    # Other launchers and programs set RANK and WORLD_SIZE too.
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
