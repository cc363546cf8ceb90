"""Follows a text byte by byte through a grammar. The phone apps have the same code.

A grammar is a regular expression: {"nodes": […], "start": the number of the whole}. Each node is
made of earlier ones:

    ["bytes", [[48, 57], [101, 101]]]   one byte within any of these ranges
    ["text", "…"]                       the bytes of a text in UTF-8
    ["seq", 0, 1]                       nodes 0 and 1, one after the other
    ["alt", 0, 1]                       node 0 or node 1
    ["repeat", 0, 1, 60]                node 0, one to 60 times; null means without end

What may follow a byte is again a grammar: the derivative (https://doi.org/10.1145/321239.321249).
Equal grammars get the same number, so each derivative is made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_runtime.errors import ConstraintError
from gemma_runtime.text.tools import Json

NOTHING, END = 0, 1  # no text at all, and the empty text
_MOST_WORK = 1_000_000  # parts of nodes, and steps to make them
_DEEPEST = 256  # calls of one derivative within another


@dataclass(frozen=True, slots=True)
class _Bytes:
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Seq:
    first: int
    rest: int


@dataclass(frozen=True, slots=True)
class _Alt:
    cases: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    body: int
    least: int
    most: int | None


_Node = _Bytes | _Seq | _Alt | _Repeat


class ByteGrammar:
    """A grammar. Its states are numbers.

    Raises ConstraintError for anything else, and, also while it follows, for a grammar that would
    take too much memory or too deep a stack.
    """

    def __init__(self, grammar: Json) -> None:
        self._nodes: list[_Node] = [_Alt(()), _Bytes(())]  # the second is never looked at
        self._numbers: dict[_Node, int] = {}
        self._may_end = [False, True]
        self._depths = [1, 1]  # of the calls that a derivative takes
        self._work = 0
        self._after: dict[tuple[int, int], int] = {}
        match grammar:
            case {"nodes": [*nodes], "start": start}:
                read: list[int] = []
                for node in nodes:
                    read.append(self._read(node, read))
                if _is_earlier(start, read):
                    self.start = read[start]
                    return
        raise ConstraintError("the grammar has no nodes or no start; compile it again")

    def after(self, state: int, byte: int) -> int:
        """The state behind a byte; NOTHING if the byte may not come next."""
        key = (state, byte)
        if key not in self._after:
            self._after[key] = self._derive(state, byte)
        return self._after[key]

    def follow(self, state: int, text: bytes) -> int:
        """The state behind some bytes; NOTHING if they may not come next."""
        for byte in text:
            if state == NOTHING:
                break
            state = self.after(state, byte)
        return state

    def may_end(self, state: int) -> bool:
        """Whether the text may end here."""
        return self._may_end[state]

    def _derive(self, state: int, byte: int) -> int:
        if state <= END:
            return NOTHING
        node = self._nodes[state]
        if isinstance(node, _Bytes):
            return END if any(low <= byte <= high for low, high in node.ranges) else NOTHING
        if isinstance(node, _Seq):
            behind = self._seq(self.after(node.first, byte), node.rest)
            if not self._may_end[node.first]:
                return behind
            return self._alt([behind, self.after(node.rest, byte)])
        if isinstance(node, _Alt):
            return self._alt([self.after(case, byte) for case in node.cases])
        most = None if node.most is None else node.most - 1
        left = self._repeat(node.body, max(node.least - 1, 0), most)
        return self._seq(self.after(node.body, byte), left)

    def _seq(self, first: int, rest: int) -> int:
        """Nested to the right, so that equal sequences get the same number."""
        firsts = []
        while isinstance(node := self._nodes[first], _Seq):
            firsts.append(node.first)
            first = node.rest
        self._spend(len(firsts))
        for one in (first, *reversed(firsts)):
            rest = self._pair(one, rest)
        return rest

    def _pair(self, first: int, rest: int) -> int:
        if NOTHING in (first, rest):
            return NOTHING
        if END in (first, rest):
            return max(first, rest)
        return self._number(_Seq(first, rest), self._may_end[first] and self._may_end[rest])

    def _alt(self, cases: Sequence[int]) -> int:
        flat: set[int] = set()
        for case in cases:
            node = self._nodes[case]
            parts = node.cases if isinstance(node, _Alt) else (case,)
            self._spend(len(parts))
            flat.update(parts)
        if len(flat) == 1:
            return flat.pop()
        return self._number(_Alt(tuple(sorted(flat))), any(self._may_end[case] for case in flat))

    def _repeat(self, body: int, least: int, most: int | None) -> int:
        if most == 0 or body == END:
            return END
        if body == NOTHING:
            return END if least == 0 else NOTHING
        return self._number(_Repeat(body, least, most), least == 0 or self._may_end[body])

    def _number(self, node: _Node, may_end: bool) -> int:
        if node == _Alt(()):
            return NOTHING
        if node not in self._numbers:
            self._spend(1 + len(_parts(node)))
            depth = 1 + max((self._depths[part] for part in self._calls(node)), default=0)
            if depth > _DEEPEST:
                raise _too_large()
            self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
            self._may_end.append(may_end)
            self._depths.append(depth)
        return self._numbers[node]

    def _spend(self, steps: int) -> None:
        self._work += steps
        if self._work > _MOST_WORK:
            raise _too_large()

    def _calls(self, node: _Node) -> Sequence[int]:
        """The parts whose derivatives that of a node is made of."""
        if isinstance(node, _Seq) and not self._may_end[node.first]:
            return [node.first]
        return _parts(node)

    def _read(self, node: Json, read: Sequence[int]) -> int:
        match node:
            case ["bytes", [*ranges]] if ranges and all(map(_is_range, ranges)):
                return self._number(_Bytes(tuple((low, high) for low, high in ranges)), False)
            case ["text", str(text)]:
                return self._text(text.encode())
            case ["seq", *parts] if all(_is_earlier(part, read) for part in parts):
                state = END
                for part in reversed(parts):
                    state = self._seq(read[part], state)
                return state
            case ["alt", *cases] if all(_is_earlier(case, read) for case in cases):
                return self._alt([read[case] for case in cases])
            case ["repeat", body, int(least), most] if _is_earlier(body, read) and least >= 0:
                if most is None or (isinstance(most, int) and most >= least):
                    return self._repeat(read[body], least, most)
        raise ConstraintError(f"node {len(read)} of the grammar is wrong; compile it again")

    def _text(self, text: bytes) -> int:
        state = END
        for byte in reversed(text):
            state = self._seq(self._number(_Bytes(((byte, byte),)), False), state)
        return state


def _parts(node: _Node) -> Sequence[int]:
    match node:
        case _Seq(first, rest):
            return first, rest
        case _Alt(cases):
            return cases
        case _Repeat(body):
            return (body,)
    return ()


def _too_large() -> ConstraintError:
    return ConstraintError("the grammar is too large to follow; compile a smaller schema")


def _is_range(value: Json) -> bool:
    match value:
        case [int(low), int(high)]:
            return 0 <= low <= high <= 255
    return False


def _is_earlier(value: Json, read: Sequence[int]) -> bool:
    return type(value) is int and 0 <= value < len(read)
