"""Keeps finished answers in a file, so that an interrupted run goes on where it stopped."""

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gemma_runtime.errors import EvaluationError

ANSWERS = "answers.jsonl"
Answer = tuple[float, bool] | str


class AnswerFile:
    """One line for each answer: a digest of what was asked, and the answer.

    `identity` names everything that an answer depends on besides the question. Answers of another
    identity are left alone.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._identity = identity
        self._found, whole = _read(path)
        self._file: IO[bytes] = _open(path, whole)

    def key(self, *asked: object) -> str:
        """The digest of what was asked."""
        return hashlib.sha256(json.dumps([self._identity, *asked]).encode()).hexdigest()

    def find(self, key: str) -> Answer | None:
        return self._found.get(key)

    def add(self, key: str, answer: Answer) -> None:
        self._found[key] = answer
        self._file.write(json.dumps([key, answer]).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read(path: Path) -> tuple[dict[str, Answer], int]:
    """The answers, and how many bytes they take: a killed process leaves half a line."""
    found: dict[str, Answer] = {}
    raw = path.read_bytes() if path.exists() else b""
    whole = raw.rfind(b"\n") + 1
    for number, line in enumerate(raw[:whole].splitlines(), 1):
        try:
            key, answer = json.loads(line)
            found[str(key)] = _answer(answer)
        except (ValueError, TypeError, RecursionError) as error:
            raise EvaluationError(
                f"line {number} of {path} is not an answer; delete the file and run again"
            ) from error
    return found, whole


def _answer(value: object) -> Answer:
    match value:
        case str():
            return value
        case [float() | int() as log_p, bool() as is_greedy]:
            return float(log_p), is_greedy
    raise ValueError("neither a text nor a likelihood")


def _open(path: Path, whole: int) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        file.truncate(whole)
    except OSError as error:
        raise EvaluationError(f"can't write {path}: {error.strerror}") from error
    return file
