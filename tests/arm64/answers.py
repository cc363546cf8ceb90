"""Runs bundles on one machine: the figures of `gemma-runtime verify`, and logits for one text.

    python -m tests.arm64.answers OUT.json [--like OTHER.json] BUNDLE…

Runs on the host and in the emulator, which has neither torch nor pytest. The text is generated
greedily by the bundle itself. With --like, it is the text that the other machine generated:
otherwise one near tie would change all tokens after it.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path

import msgspec

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.cli import run_command
from gemma_runtime.proof.verify import Verification
from gemma_runtime.session import open_session
from gemma_runtime.text.generate import generate

PROMPT = (2, 300, 301)
COUNT = 64  # as many as tiny_tokens.json has


@dataclass(frozen=True, slots=True)
class Answer:
    """The results of one bundle; T = len(tokens), V vocabulary."""

    exit_code: int
    verification: Verification
    tokens: list[int]  # after PROMPT
    logits: list[list[float]]  # (T, V): row i predicts tokens[i]
    exact_tokens: list[int] | None  # greedy tokens of the graph that doesn't round activations


def main(arguments: Sequence[str]) -> None:
    out, *rest = arguments
    other: dict[str, Answer] = {}
    if rest[0] == "--like":
        other, rest = load_answers(Path(rest[1])), rest[2:]
    answers = {}
    for folder in map(Path, rest):
        like = other[folder.name].tokens if other else None
        answers[folder.name] = _answer(open_bundle(folder), like)
    Path(out).write_bytes(msgspec.json.encode(answers))


def load_answers(path: Path) -> dict[str, Answer]:
    """The results that `main` wrote, by the bundle's folder name."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Answer])


def _answer(bundle: Bundle, like: Sequence[int] | None) -> Answer:
    exit_code, verification = _verify(bundle)
    with open_session(bundle, threads=1) as session:
        tokens = list(like or generate(session, PROMPT, max_new_tokens=COUNT))
        session.reset()
        rows = [session.prefill(PROMPT), *(session.decode(token) for token in tokens[:-1])]
    return Answer(
        exit_code, verification, tokens, [row.tolist() for row in rows], _exact_tokens(bundle)
    )


def _verify(bundle: Bundle) -> tuple[int, Verification]:
    """Run `gemma-runtime verify --json`, as a user would."""
    output = BytesIO()
    with redirect_stdout(TextIOWrapper(output)):
        code = run_command(["verify", str(bundle.directory), "--threads", "1", "--json"])
        return code, msgspec.json.decode(output.getvalue(), type=Verification)


def _exact_tokens(bundle: Bundle) -> list[int] | None:
    if "exact" not in bundle.manifest.graphs:
        return None
    with open_session(bundle, threads=1, exact=True) as session:
        return list(generate(session, PROMPT, max_new_tokens=COUNT))


if __name__ == "__main__":
    main(sys.argv[1:])
