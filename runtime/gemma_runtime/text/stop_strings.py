"""Cuts streamed text before a stop string."""

from collections.abc import Sequence

from gemma_runtime.errors import SessionError


class StopStrings:
    """Passes streamed text on up to the first stop string.

    Holds back the end of the text while it could be the beginning of a stop string.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise SessionError("a stop string is empty; give at least one character or omit it")
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return the text that can be shown now, "" after a stop string."""
        if self.found:
            return ""
        held = self._held + text
        # The stop string that ends first wins, so that the result doesn't depend on how the text
        # is split into pieces.
        starts = ((stop, held.find(stop)) for stop in self._stops)
        ends = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if ends:
            self.found = True
            self._held = ""
            return held[: min(ends)[1]]
        safe = len(held) - self._partial_match(held)
        self._held = held[safe:]
        return held[:safe]

    def flush(self) -> str:
        """Return the text held back. Call it when no more text follows."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
