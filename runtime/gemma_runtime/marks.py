"""Marks: places that a session can go back to, and the copies of caches that are kept for them."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

from gemma_runtime.errors import SessionError


@dataclass(frozen=True, slots=True)
class CacheCopy:
    """Caches that dropped tokens would be lost from, as they were once."""

    restore: Callable[[], None]  # puts them back
    written: int  # most tokens that had been written into them


class Mark:
    """A place in a session that `Session.hold` keeps for as long as the mark is referenced.

    If the session goes back beyond it, the mark moves there: the tokens after it are forgotten.
    """

    def __init__(self, position: int) -> None:
        self._position = position
        self.copy: CacheCopy | None = None

    @property
    def position(self) -> int:
        """Tokens in the caches after going back to this mark."""
        return self._position

    def move_back(self, position: int) -> None:
        if position < self._position:
            self._position, self.copy = position, None


class Marks:
    """The marks of one session that are still referenced."""

    def __init__(self) -> None:
        self._live: WeakSet[Mark] = WeakSet()

    def add(self, position: int) -> Mark:
        mark = Mark(position)
        self._live.add(mark)
        return mark

    def resolve(self, to: int | Mark, current: int) -> int:
        """The position that `to` means. Raises SessionError if the session can't go back to it."""
        if isinstance(to, Mark):
            if to not in self._live:
                raise SessionError("the mark is of another session; hold one in this session")
            return to.position
        if not 0 <= to <= current:
            raise SessionError(
                f"can't go back to position {to}: {current} tokens are in the cache; give 0 to "
                f"{current}"
            )
        return to

    def move_back(self, position: int) -> None:
        """Tell the marks that the session has gone back to a position."""
        for mark in self._live:
            mark.move_back(position)

    def up_to(self, position: int) -> list[Mark]:
        """The marks at or before a position, the last one last."""
        before = [mark for mark in self._live if mark.position <= position]
        return sorted(before, key=lambda mark: mark.position)
