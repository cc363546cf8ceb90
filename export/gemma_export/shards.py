"""Shares the calibration text among the ranks of torchrun, and adds up what each finds in its own.

A text has the same pieces for any number of ranks; each rank owns some that lie side by side. What
is found in a piece is added to the others' in a tree over the pieces, so any number of ranks gives
the same bits. Without torchrun there is one rank, which owns them all.

Every function that mentions all ranks has to be called by each of them, in the same order.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed

from gemma_export import cache_lock
from gemma_export.device import HOST, grain
from gemma_export.parallel import in_order, workers
from gemma_export.ranks import count_local_ranks, count_ranks, local_rank, own_rank
from gemma_runtime.cache import writable_cache
from gemma_runtime.errors import GemmaError, RankError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECES = 8  # of a text with twice as many sequences; more would hold more sums at a time
HELD = PIECES.bit_length()  # most sums that wait for each other in the tree
_PATIENCE = timedelta(days=30)  # a rank may wait for another's rounding, or for a lock
_FAILED = "failed"  # key of the error of a rank


@dataclass(frozen=True, slots=True)
class Piece:
    index: int  # among all pieces of the text
    sequences: range  # among those that this rank owns


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank owns of a text."""

    count: int  # sequences of the whole text

    @property
    def own(self) -> range:
        """The sequences that this rank owns."""
        first, last = self._own_pieces[0], self._own_pieces[-1]
        return range(self._start(first), self._start(last + 1))

    @property
    def pieces(self) -> list[Piece]:
        """The pieces that this rank owns; none is empty."""
        own = self.own.start
        return [
            Piece(i, range(self._start(i) - own, self._start(i + 1) - own))
            for i in self._own_pieces
        ]

    @property
    def count_pieces(self) -> int:
        """Of the whole text; each has two sequences, or it is the only one."""
        return min(PIECES, max(1, self.count // 2))

    @property
    def _own_pieces(self) -> range:
        first, last = (place * self.count_pieces // ranks() for place in (rank(), rank() + 1))
        return range(first, last)

    def _start(self, piece: int) -> int:
        return piece * self.count // self.count_pieces


@dataclass(slots=True)
class _Sum:
    """The sum over `size` pieces from `start`, by name."""

    start: int
    size: int
    values: dict[str, Tensor]


class Sums:
    """Sums over the pieces of a text, by name."""

    def __init__(self) -> None:
        self._sums: list[_Sum] = []
        self._piece: _Sum | None = None

    def of(self, piece: Piece) -> dict[str, Tensor]:
        """The sums of a piece, to add to. Pieces come in order."""
        if self._piece is None or self._piece.start != piece.index:
            self._close()
            self._piece = _Sum(piece.index, 1, {})
        return self._piece.values

    def total(self) -> dict[str, Tensor]:
        """The sums of all pieces of all ranks."""
        self._close()
        if ranks() == 1:
            return _joined(self._sums).values
        places = _all([(one.start, one.size) for one in self._sums])
        own = [one.values for one in self._sums]
        return {name: _total([one.pop(name) for one in own], places) for name in list(own[0])}

    def _close(self) -> None:
        if self._piece is not None:
            _push(self._sums, self._piece)
            self._piece = None


def _push(sums: list[_Sum], one: _Sum) -> None:
    """Append a sum, and join those that are siblings in the tree."""
    sums.append(one)
    while len(sums) > 1 and _are_siblings(*sums[-2:]):
        _join_last(sums)


def _are_siblings(left: _Sum, right: _Sum) -> bool:
    is_next = right.start == left.start + left.size
    return is_next and left.size == right.size and left.start % (2 * left.size) == 0


def _join_last(sums: list[_Sum]) -> None:
    right = sums.pop()
    for name, values in right.values.items():
        sums[-1].values[name].add_(values)
    sums[-1].size += right.size


def _joined(sums: list[_Sum]) -> _Sum:
    """What is left if the number of pieces isn't a power of two."""
    while len(sums) > 1:
        _join_last(sums)
    return sums[0]


def _total(own: list[Tensor], places: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """The sum over all ranks, from this rank's sums and the places of each rank's in the tree."""
    mine = [_sendable(values) for values in own]
    sums: list[_Sum] = []
    with _reaching():
        for sender, spans in enumerate(places):
            for index, (start, size) in enumerate(spans):
                if rank() == 0:
                    values = mine[index] if sender == 0 else torch.empty_like(mine[0])
                    if sender:
                        distributed.recv(values, sender)
                    _push(sums, _Sum(start, size, {"": values}))
                elif rank() == sender:
                    distributed.send(mine[index], 0)
        total = _joined(sums).values[""] if sums else mine[0]
        distributed.broadcast(total, 0)
    return total.to(own[0].device)


def _sendable(x: Tensor) -> Tensor:
    """On a device that ranks can send from."""
    return (x if x.device.type == "cuda" else x.cpu()).contiguous()


def is_first() -> bool:
    """Whether this rank prints and writes; also after the ranks have parted."""
    return own_rank() == 0


def rank() -> int:
    return own_rank() if _group is not None else 0


def ranks() -> int:
    return count_ranks() if _group is not None else 1


def suffix() -> str:
    """What the names of this rank's own files end with; nothing if it is the only one."""
    return f"-rank-{rank()}-of-{ranks()}" if ranks() > 1 else ""


def check_text(sequences: int) -> None:
    """Raise RankError if a text is too short to be shared among all ranks."""
    if Share(sequences).count_pieces < ranks():
        raise RankError(
            f"{ranks()} ranks can't share {sequences} sequences of calibration text, expected two "
            "for each; give a longer --calibration, or start fewer ranks"
        )


def wait() -> None:
    """Wait for all ranks."""
    _all(None)


def from_first(make: Callable[[], Result]) -> Result:
    """What the first rank makes, for all ranks; they wait for it. Tensors arrive on the host."""
    if ranks() == 1:
        return make()
    made: list[Any] = [_on_host(make()) if rank() == 0 else None]
    with _reaching():
        distributed.broadcast_object_list(made, 0)
    result: Result = made[0]
    return result


def after_first(make: Callable[[], Result]) -> Result:
    """What each of all ranks makes for itself, the first before the others: it may download."""
    if rank():
        wait()
        return make()
    made = make()
    wait()
    return made


def summed(count: int) -> int:
    """The sum of all ranks' counts."""
    return sum(_all(count))


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in the text's order."""
    if ranks() == 1:
        return rows
    return torch.cat(_all(rows.cpu())).to(rows.device)


def dealt(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`in_order` on all ranks: each computes its share of the items, and all get every result.

    Of several ranks, results that are tensors, or dicts of them, are on the host.
    """
    if ranks() == 1:
        yield from in_order(function, items)
        return
    own = in_order(function, items[rank() :: ranks()])
    for start in range(0, len(items), ranks()):
        mine = _on_host(next(own)) if start + rank() < len(items) else None
        yield from _all(mine)[: len(items) - start]


def resumed_at(index: int | None, choose: Callable[[Sequence[int]], int]) -> int | None:
    """The place that all ranks go on from, given this rank's own; None if one has none.

    Ranks that were ended together are at most one apart, if each waits before it deletes a file.
    """
    places = _all(index) if ranks() > 1 else [index]
    found = [place for place in places if place is not None]
    return choose(found) if len(found) == len(places) else None


@contextmanager
def exclusive(path: Path, work: str, note: Callable[[str], None]) -> Iterator[None]:
    """`cache_lock.exclusive` by the first rank, for all ranks."""
    if rank():
        wait()
        yield
        return
    with cache_lock.exclusive(path, work, note):
        wait()
        yield


def _on_host(result: Any) -> Any:
    """Tensors of another rank's device would be read to that device."""
    if isinstance(result, Mapping):
        return {name: _on_host(value) for name, value in result.items()}
    return result.cpu() if isinstance(result, Tensor) else result


def _all(mine: Any) -> list[Any]:
    """What all ranks give, by rank."""
    if ranks() == 1:
        return [mine]
    found: list[Any] = [None] * ranks()
    with _reaching():
        distributed.all_gather_object(found, mine)
    return found


@dataclass(slots=True)
class _Group:
    store: "Store"
    is_failing: bool = False

    def lost(self) -> RankError:
        """What has ended this rank's work: the error of another, or its end."""
        self.is_failing = True
        if self.store.check([_FAILED]):
            return RankError(self.store.get(_FAILED).decode())
        return RankError(
            "a rank was lost; torchrun tells which. Nothing was written but finished layers, which "
            "the next run goes on from"
        )


_group: _Group | None = None  # while ranks are joined
_times = count()  # that they have been


@contextmanager
def _reaching() -> Iterator[None]:
    """Raise RankError if another rank can't be reached."""
    assert _group is not None
    try:
        yield
    except RuntimeError as error:  # torch has no class of its own for a closed connection
        raise _group.lost() from error


@contextmanager
def joined(kind: str) -> Iterator[None]:
    """Let all ranks work together, on this kind of device, until the block ends.

    An error on any rank ends all: the first raises RankError with it, the others end silently. Does
    nothing without torchrun.
    """
    global _group
    if count_ranks() == 1:
        yield
        return
    _check_ranks()
    _group = group = _Group(_connect(kind))
    threads = max(1, grain(HOST).workers // count_local_ranks())
    try:
        with _ended_by_torchrun(group), workers(threads):
            _check_folder()
            yield
            wait()
    except (GemmaError, OSError) as error:
        if rank() == 0:
            raise
        if not isinstance(error, RankError):
            group.store.set(_FAILED, f"rank {rank()}: {error}")
        raise SystemExit(1) from error
    finally:
        _group = None
        distributed.destroy_process_group()


def _check_ranks() -> None:
    if count_ranks() > PIECES:
        raise RankError(
            f"torchrun started {count_ranks()} ranks, but a text has {PIECES} pieces; start at "
            f"most {PIECES} ranks"
        )
    if distributed.is_initialized():
        raise RankError(
            "this program uses torch.distributed itself; export in another, started by torchrun"
        )


def _connect(kind: str) -> "Store":
    """Join the ranks; their store, which outlives a rank because torchrun holds it."""
    backend = "gloo"
    if kind == "cuda":
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    # A torch without torch.distributed lacks them.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    all_stores, own, world = next(rendezvous("env://"))
    store: Store = PrefixStore(f"gemma-export-{next(_times)}", all_stores)
    with _quiet_output():
        distributed.init_process_group(
            backend, store=store, rank=own, world_size=world, timeout=_PATIENCE
        )
        distributed.barrier()
    return store


@contextmanager
def _quiet_output() -> Iterator[None]:
    """Hide what gloo writes to stdout, where --json writes."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


@contextmanager
def _ended_by_torchrun(group: _Group) -> Iterator[None]:
    """Raise RankError in the first rank if torchrun ends it, as it does when another failed."""

    def end(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if not group.is_failing:
            raise group.lost()

    if rank() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until it has printed why
        raise
    signal.signal(signal.SIGTERM, before)


def _check_folder() -> None:
    """Raise RankError unless all ranks see the first one's cache."""
    token = writable_cache() / f"ranks-{from_first(lambda: uuid4().hex)}"
    if rank() == 0:
        token.touch()
    wait()
    seen = _all(token.exists())
    if rank() == 0:
        token.unlink()
    if not all(seen):
        raise RankError(
            f"rank {seen.index(False)} doesn't see the cache of rank 0; let GEMMA_EXPORT_CACHE "
            "name a folder that all ranks share"
        )
