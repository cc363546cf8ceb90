"""A bundle's session for tests in other languages, line by line over two files.

    python -m tests.data.session_bridge BUNDLE IN OUT [--exact]

`POSITION ROWS ID ID …` appends tokens; the answer is the logits of the last ROWS of them, float32,
little-endian, base64. Position 0 forgets what was before.
"""

import base64
import sys
from collections.abc import Sequence
from pathlib import Path

from gemma_runtime.bundle import open_bundle
from gemma_runtime.session import Session, open_session


def main(arguments: Sequence[str]) -> None:
    directory, source, sink = map(Path, arguments[:3])
    with (
        open_session(open_bundle(directory), threads=1, exact="--exact" in arguments) as session,
        source.open(encoding="ascii") as questions,
        sink.open("w", encoding="ascii") as answers,
    ):
        for line in questions:
            answers.write(_answer(session, [int(word) for word in line.split()]) + "\n")
            answers.flush()


def _answer(session: Session, words: Sequence[int]) -> str:
    position, rows, *tokens = words
    if position == 0:
        session.reset()
    if position != session.position:
        raise SystemExit(f"asked to write at {position}, the session is at {session.position}")
    logits = session.score(tokens)[-rows:]  # (rows, V)
    return base64.b64encode(logits.astype("<f4").tobytes()).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
