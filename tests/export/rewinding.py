"""Checks of `Session.rewind`, `hold` and `resume`: bit for bit the logits of a fresh session.

The arithmetic of most runtimes depends on how tokens are cut into chunks, so the fresh session gets
the same calls.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from gemma_runtime.bundle import Bundle
from gemma_runtime.marks import Mark
from gemma_runtime.session import Logits, Session
from gemma_runtime.snapshot_file import check_maker, describe_maker, open_snapshot, write_snapshot

Call = list[int]  # the tokens of one call: of `decode` if it is one, else of `prefill`
Operation = tuple[str, int]

_NEXT: list[Call] = [[5], [7, 11, 13]]  # fed after going back

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 30)),
        st.tuples(st.just("feed"), st.just(1)),
        st.tuples(st.just("hold"), st.just(0)),
        st.tuples(st.just("rewind"), st.integers(0, 8)),
        st.tuples(st.just("return"), st.integers(0, 3)),
        st.tuples(st.just("drop"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=4,
    max_size=30,
)


def check_rewinds(
    session: Session, tokens: Sequence[int], positions: Sequence[int], back: int, mark: bool
) -> list[int]:
    """Go back by `back` tokens to each position, and feed the rest again; returns the answers."""
    answers = []
    for position in positions:
        expected = _replay(session, [list(tokens[:position]), *_NEXT])
        session.reset()
        session.prefill(tokens[:position])
        held = session.hold() if mark else None
        session.prefill(tokens[-back:])
        answers.append(session.rewind(position if held is None else held))
        assert session.position == answers[-1]
        assert answers[-1] in (0, position)
        if answers[-1] == 0:
            session.prefill(tokens[:position])
        actual = [_feed(session, call) for call in _NEXT]
        assert np.array_equal(np.stack(actual), expected[1:]), position
    return answers


def check_operations(session: Session, fresh: Session, operations: Sequence[Operation]) -> None:
    """After each rewind and at the end, feed a token: its logits are those of a fresh session."""
    calls: list[Call] = []
    marks: list[Mark] = []
    session.reset()
    rng = np.random.default_rng(len(operations))
    for name, number in operations:
        ends = [0, *np.cumsum([len(call) for call in calls]).tolist()]
        if name == "feed":
            room = session.context_length - session.position - 1
            if call := rng.integers(0, 22, min(number, room)).tolist():
                calls.append(call)
                _feed(session, call)
        elif name == "hold":
            marks.append(session.hold())
        elif name == "drop" and marks:
            del marks[number % len(marks)]
        elif name == "reset":
            session.reset()
            calls.clear()
        elif name in ("rewind", "return"):
            to: int | Mark = ends[-1 - number % len(ends)]
            if name == "return" and marks:
                to = marks[number % len(marks)]
            wanted = to.position if isinstance(to, Mark) else to
            answer = session.rewind(to)
            assert answer == session.position <= wanted
            del calls[ends.index(answer) :]
            _check_next(session, fresh, calls)
    _check_next(session, fresh, calls)


def check_resumes(
    session: Session, other: Session, calls: Sequence[Call], goes_back: bool = True
) -> None:
    """Feed calls, save, and go on in another session that holds other tokens.

    Its logits are those of a session that got the calls. If `goes_back`, it goes back as far.
    """
    expected = _replay(session, [*calls, *_NEXT])[-len(_NEXT) :]
    _replay(session, calls)
    snapshot = session.save()
    _replay(other, [[9] * 30, [8]])
    mark = other.hold()
    other.resume(snapshot)
    assert (other.tokens, mark.position) == ([token for call in calls for token in call], 0)
    assert np.array_equal(np.stack([_feed(other, call) for call in _NEXT]), expected)
    for to in {len(snapshot.tokens) - 1, len(snapshot.tokens) // 2, 0} if goes_back else ():
        _replay(session, calls)
        other.resume(snapshot)
        assert other.undoable(40) == session.undoable(40)
        assert other.rewind(to) == session.rewind(to)
        assert np.array_equal(_feed(other, [3]), _feed(session, [3]))


def check_resumes_from_file(session: Session, other: Session, bundle: Bundle, path: Path) -> None:
    """What one session holds goes through a file to the other."""
    expected = _replay(session, [[5] * 20, *_NEXT])[-len(_NEXT) :]
    _replay(session, [[5] * 20])
    write_snapshot(path, session.save(), describe_maker(bundle), {})
    stored = open_snapshot(path)
    check_maker(path, stored.maker, bundle)
    other.resume(stored.snapshot)
    assert np.array_equal(np.stack([_feed(other, call) for call in _NEXT]), expected)


def cut(tokens: Sequence[int], length: int) -> list[Call]:
    """Calls of `length` tokens, the last one shorter."""
    return [list(tokens[at : at + length]) for at in range(0, len(tokens), length)]


def _check_next(session: Session, fresh: Session, calls: list[Call]) -> None:
    """Append one token to both sessions and to `calls`."""
    calls.append([3])
    assert np.array_equal(_feed(session, calls[-1]), _replay(fresh, calls)[-1])


def _replay(session: Session, calls: Sequence[Call]) -> Logits:
    """The last logits of each call on an empty session: (calls, V)."""
    session.reset()
    return np.stack([_feed(session, call) for call in calls if call])


def _feed(session: Session, call: Call) -> Logits:
    return session.decode(call[0]) if len(call) == 1 else session.prefill(call)
