"""What one machine says of bundles: `gemma-runtime verify`'s figures, and logits along one text.

    python -m tests.arm64.answers OUT.json [--like OTHER.json] BUNDLE…

Runs on the machine that tests, and on the emulated one, which has no torch and no pytest. The text
of a bundle is what its shipped graph says greedily, or with --like what it said on the other
machine, so that one token that fell the other way does not part all that follow.
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
    """Of one bundle; T = len(tokens), V vocabulary."""

    exit_code: int
    verification: Verification
    tokens: list[int]  # after PROMPT
    logits: list[list[float]]  # (T, V), each row is what the token of its place was chosen from
    exact_tokens: list[int] | None  # greedily by the graph that rounds no activations


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
    """What `main` wrote, by the bundle's folder name."""
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
    """By the command line, as a user would."""
    said = BytesIO()
    with redirect_stdout(TextIOWrapper(said)):
        code = run_command(["verify", str(bundle.directory), "--threads", "1", "--json"])
        return code, msgspec.json.decode(said.getvalue(), type=Verification)


def _exact_tokens(bundle: Bundle) -> list[int] | None:
    if "exact" not in bundle.manifest.graphs:
        return None
    with open_session(bundle, threads=1, exact=True) as session:
        return list(generate(session, PROMPT, max_new_tokens=COUNT))


if __name__ == "__main__":
    main(sys.argv[1:])
