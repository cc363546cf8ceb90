"""A place in a session from which several continuations start."""

from collections.abc import Sequence

from gemma_runtime.session import Session
from gemma_runtime.text.shared_prefix import common_length


class Fork:
    """Feeds shared tokens once, if the caches can go back to their end; else again each time.

    The session is reset first. `tokens` may not be empty.
    """

    def __init__(self, session: Session, tokens: Sequence[int]) -> None:
        self._session = session
        self._tokens = tokens
        session.reset()
        self._feed(0)

    def back(self) -> Session:
        """The session, with nothing but the shared tokens in it."""
        position = self._session.rewind(self._mark)
        if position < len(self._tokens):
            self._feed(position)
        return self._session

    def _feed(self, start: int) -> None:
        self._session.prefill(self._tokens[start:])
        self._mark = self._session.hold()


def shared_beginning(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with, leaving at least one of each."""
    shortest = min(sequences, key=len)
    return min(len(shortest) - 1, *(common_length(shortest, other) for other in sequences))
