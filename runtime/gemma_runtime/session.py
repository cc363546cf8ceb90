"""A session is one loaded artifact with its KV caches. It takes token ids, not text."""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from packaging.version import InvalidVersion, Version

from gemma_runtime.backend_table import BACKENDS, load_function
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.machine import check_threads
from gemma_runtime.marks import Mark, Marks
from gemma_runtime.snapshot import Snapshot

Logits = NDArray[np.float32]


class Session(Protocol):
    """Shapes: T new tokens, V vocabulary."""

    @property
    def position(self) -> int:
        """Number of tokens in the caches."""
        ...

    @property
    def tokens(self) -> list[int]:
        """The tokens in the caches."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens the caches can hold."""
        ...

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens in chunks; returns the logits after the last one, (V,).

        Raises ContextFull before any cache changes if they don't fit.
        """
        ...

    def decode(self, token: int) -> Logits:
        """Append one token; returns the logits after it, (V,)."""
        ...

    def score(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; returns the logits after each of them, (T, V)."""
        ...

    def rewind(self, to: int | Mark) -> int:
        """Go back to a position, or before it; returns the position now, at most the one asked for.

        The caches are then exactly those of a session that was fed the tokens up to there, in the
        same chunks. Where they no longer hold what `to` needs, it goes back further: to the last
        mark before, or to 0. The caller feeds the rest again.
        Raises SessionError for a position below 0 or after the current one, and for a mark of
        another session.
        """
        ...

    def undoable(self, most: int) -> int:
        """How many of the next `most` tokens can be fed and then taken back by `rewind`.

        Only those count after which going back to here needs no mark and feeds nothing again.
        """
        ...

    def hold(self) -> Mark:
        """Mark the current position: `rewind` can go back to it while the mark is referenced.

        What later tokens would push out of the caches is copied when they come, if the backend can
        copy its caches; docs/runtime.md says which can. Going back beyond a mark moves it there,
        and a reset moves it to 0.
        """
        ...

    def save(self) -> Snapshot:
        """Copy what the caches hold, for `resume`.

        Raises SessionError if they hold nothing, or if the backend can't read them.
        """
        ...

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, of this session or of another one on the same bundle.

        It continues exactly as the one that was saved would. That one's marks are not there, and
        its own move to 0. Raises SessionError for a snapshot of another graph; the session is then
        empty.
        """
        ...

    def reset(self) -> None:
        """Forget every token."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def open_session(bundle: Bundle, threads: int | None = None, exact: bool = False) -> Session:
    """Load the bundle's artifact. `threads=None` uses all physical cores.

    `exact` loads the graph with float activations, which separates faults from rounding. Raises
    SessionError if the bundle has no such graph.
    """
    check_threads(threads)
    target = bundle.manifest.target.name
    if target not in BACKENDS:
        raise SessionError(
            f"no backend runs target {target!r}; known targets: {', '.join(BACKENDS)}"
        )
    graph = "exact" if exact else "decode"
    if graph not in bundle.manifest.graphs:
        raise SessionError(f"{bundle.directory} has no {graph} graph; export it again")
    session: Session = load_function(BACKENDS[target].opener)(bundle, threads, graph)
    return session


def check_room(position: int, new: int, context_length: int) -> None:
    """Raise ContextFull if `new` tokens don't fit after `position` tokens."""
    if position + new > context_length:
        raise ContextFull(
            f"{position} tokens are in the cache and {new} more would pass the context of "
            f"{context_length}; shorten the prompt or export with a larger --context"
        )


def check_runtime(package: str, installed: str, minimum: str) -> None:
    """Raise SessionError if the installed runtime is older than the bundle needs."""
    try:
        is_older = Version(installed) < Version(minimum)
    except InvalidVersion as error:
        raise SessionError(
            f"can't compare {package} {installed} with {minimum}, which this bundle needs: "
            f"{error}; export again"
        ) from error
    if is_older:
        raise SessionError(
            f"{package} {installed} is too old: this bundle needs {minimum} or newer; "
            f"run: pip install -U {package}"
        )


class FakeSession:
    """A session without a model, for tests of code that uses one.

    `script` maps the tokens so far to the next logits, (V,). `slack` is how many tokens it goes
    back without a mark.
    """

    def __init__(
        self,
        script: Callable[[Sequence[int]], Logits],
        context_length: int = 4096,
        slack: int | None = None,
    ) -> None:
        self._script = script
        self._context_length = context_length
        self._slack = context_length if slack is None else slack
        self._tokens: list[int] = []
        self._marks = Marks()

    @property
    def position(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        return self._tokens.copy()

    @property
    def context_length(self) -> int:
        return self._context_length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        logits: Logits = self.score(tokens)[-1]
        return logits

    def decode(self, token: int) -> Logits:
        return self.prefill([token])

    def score(self, tokens: Sequence[int]) -> Logits:
        check_tokens(tokens)
        check_room(self.position, len(tokens), self._context_length)
        rows = []
        for token in tokens:
            self._tokens.append(token)
            rows.append(self._script(self._tokens))
        return np.stack(rows).astype(np.float32)

    def rewind(self, to: int | Mark) -> int:
        position = self._marks.resolve(to, self.position)
        if position < self.position - self._slack:
            marks = self._marks.up_to(position)
            position = marks[-1].position if marks else 0
        self._go_back(position)
        return position

    def undoable(self, most: int) -> int:
        return min(most, self._slack)

    def hold(self) -> Mark:
        return self._marks.add(self.position)

    def save(self) -> Snapshot:
        check_tokens(self._tokens)
        return Snapshot(tuple(self._tokens), len(self._tokens), graph="", caches={})

    def resume(self, snapshot: Snapshot) -> None:
        self.reset()
        self._tokens = list(snapshot.tokens)

    def reset(self) -> None:
        self._go_back(0)

    def _go_back(self, position: int) -> None:
        del self._tokens[position:]
        self._marks.move_back(position)

    def close(self) -> None:
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_tokens(tokens: Sequence[int], vocab_size: int | None = None) -> None:
    """Raise SessionError for an empty prompt or an id outside the vocabulary."""
    if len(tokens) == 0:
        raise SessionError("no tokens given; a prompt needs at least one (the bos token)")
    if vocab_size is None:
        return
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise SessionError(f"token {token} is outside the vocabulary of {vocab_size}")
