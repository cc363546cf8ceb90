"""Base of sessions whose graph takes a chunk: keeps position, marks and snapshots, cuts chunks."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Self

from gemma_runtime.errors import SessionError
from gemma_runtime.manifest import Manifest
from gemma_runtime.marks import CacheCopy, Mark, Marks
from gemma_runtime.session import Logits, check_room, check_tokens
from gemma_runtime.snapshot import (
    Array,
    Caches,
    Snapshot,
    copy_local,
    copy_rows,
    put_rows,
)


class ChunkedSession(ABC):
    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._tokens: list[int] = []
        self._written = 0  # most tokens that were in the caches since they were empty
        self._marks = Marks()

    @property
    def position(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        return self._tokens.copy()

    @property
    def context_length(self) -> int:
        return self._manifest.context_length

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> Logits: ...

    @abstractmethod
    def score(self, tokens: Sequence[int]) -> Logits: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _holds(self, position: int, written: int) -> bool:
        """Whether caches in which `written` tokens were can go on from `position`, exactly.

        If they can't, they can't for any larger `written` either.
        """

    @property
    def _caches(self) -> Caches | None:
        """The caches; None if the backend can't reach them."""
        return None

    @property
    def _graph(self) -> str:
        """The file of the graph whose caches these are, and what runs it."""
        return self._manifest.graphs["decode"][0].file

    def decode(self, token: int) -> Logits:
        return self.prefill([token])

    def rewind(self, to: int | Mark) -> int:
        position = self._marks.resolve(to, self.position)
        if not self._holds(position, self._written):
            position = self._restore(position)
        self._go_back(position)
        return position

    def undoable(self, most: int) -> int:
        position = self.position
        counts = range(1, most + 1)
        return bisect_left(  # how many come before the first that would lose something
            counts, True, key=lambda n: not self._holds(position, max(self._written, position + n))
        )

    def hold(self) -> Mark:
        return self._marks.add(self.position)

    def save(self) -> Snapshot:
        check_tokens(self._tokens)
        return Snapshot(tuple(self._tokens), self._written, self._graph, self._read_caches())

    def resume(self, snapshot: Snapshot) -> None:
        self.reset()
        self._check_snapshot(snapshot)
        self._write_caches(snapshot)
        self._tokens, self._written = list(snapshot.tokens), snapshot.written

    def reset(self) -> None:
        # Attention ignores slots past the position, so there is nothing to clear.
        self._written = 0
        self._go_back(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _admit(self, tokens: Sequence[int]) -> None:
        """Check new tokens, and copy what they would push out of the caches if a mark needs it."""
        check_tokens(tokens, self._manifest.vocab_size)
        check_room(self.position, len(tokens), self.context_length)
        written = max(self._written, self.position + len(tokens))
        pushed = [
            mark
            for mark in self._marks.up_to(self.position)
            if mark.copy is None and mark.position and not self._holds(mark.position, written)
        ]
        copy = self._copy_local() if pushed else None
        for mark in pushed:
            mark.copy = copy
        self._written = written

    def _copy_local(self) -> CacheCopy | None:
        """A copy of the caches that drop tokens; None if the backend can't reach them."""
        caches = self._caches
        return None if caches is None else CacheCopy(copy_local(caches), self._written)

    def _check_snapshot(self, snapshot: Snapshot) -> None:
        """Raise SessionError for tokens and counts that no session of this graph can have."""
        count, written = len(snapshot.tokens), snapshot.written
        if snapshot.graph != self._graph:
            raise SessionError(
                f"the snapshot is of {snapshot.graph}, this session runs {self._graph}; save one "
                "in a session like this"
            )
        check_tokens(snapshot.tokens, self._manifest.vocab_size)
        fits = count <= written <= self.context_length
        if not fits or not self._holds(count, written):
            raise SessionError(
                f"the snapshot has {count} tokens after {written}, which no session of this "
                "bundle can hold; save it again"
            )

    def _read_caches(self) -> Mapping[str, Array]:
        return copy_rows(self._reachable(), self._manifest.layers, self._written)

    def _write_caches(self, snapshot: Snapshot) -> None:
        put_rows(self._reachable(), self._manifest.layers, snapshot)

    def _reachable(self) -> Caches:
        caches = self._caches
        if caches is None:
            raise SessionError(
                f"this {self._manifest.target.label} program keeps its caches to itself, so a "
                "session can't be saved or resumed; docs/runtime.md says which can"
            )
        return caches

    def _restore(self, position: int) -> int:
        """Put the copy of the last mark up to a position back; returns where that is, or 0."""
        for mark in reversed(self._marks.up_to(position)):
            if mark.copy is not None:
                mark.copy.restore()
                self._written = mark.copy.written
                return mark.position
        self.reset()
        return 0

    def _go_back(self, position: int) -> None:
        del self._tokens[position:]
        self._marks.move_back(position)

    def _chunks(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        step = self._manifest.prefill_length
        return [tokens[i : i + step] for i in range(0, len(tokens), step)]
