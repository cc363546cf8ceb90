"""Serves a bundle's session to tests in other languages, over two files.

    python -m tests.data.session_bridge BUNDLE IN OUT [--exact]

A line `POSITION ROWS ID ID …` in IN appends tokens. The answer in OUT is one line: the logits of
the last ROWS tokens as little-endian float32, in base64. An earlier position goes back to it.
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
        source.open(encoding="ascii") as requests,
        sink.open("w", encoding="ascii") as answers,
    ):
        for line in requests:
            answers.write(_answer(session, [int(word) for word in line.split()]) + "\n")
            answers.flush()


def _answer(session: Session, request: Sequence[int]) -> str:
    position, rows, *tokens = request
    held = session.rewind(position) if position < session.position else session.position
    if position != held:
        raise SystemExit(
            f"error: request for position {position}, but the session is at {held}; send that "
            "position, or an earlier one that the caches still hold"
        )
    logits = session.score(tokens)[-rows:]  # (rows, V)
    return base64.b64encode(logits.astype("<f4").tobytes()).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
