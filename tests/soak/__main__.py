"""Runs one session for long, opens many, and runs some at once, on the committed tiny bundle.

    python -m tests.soak --tokens 200000 --opens 1000

Tokens are generated greedily, sampled, under a constraint and with drafts, after resets, rewinds
and whatever was there before. Now and then a fresh session must give the very same tokens. Memory
must stay flat, and neither threads nor descriptors may be left. The exit code is 1 if not.

Activations are floats: in int8, tokens fed together are rounded a little differently than one by
one, which changes logits by up to 0.2 here.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.session import Session, open_session
from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.draft import PromptLookup
from gemma_runtime.text.generate import generate
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer

_TINY = Path(__file__).parents[1] / "data" / "tiny"
_STOP = (1, 5)
_FLAT = 24 << 20  # bytes that a process may grow by after its first tenth
_CHECKED = 25  # one round in so many is repeated by a fresh session
_AT_ONCE = 4


class Figures(msgspec.Struct):
    tokens: int = 0
    rounds: int = 0
    checked: int = 0
    opens: int = 0
    grown_bytes: int = 0  # resident, while tokens were generated
    grown_by_opens: int = 0
    grown_threads: int = 0
    grown_descriptors: int = 0
    problems: list[str] = []


class Round(msgspec.Struct, frozen=True):
    """What is generated: everything that its tokens depend on besides the session's own."""

    prompt: list[int]
    most: int
    kind: str  # greedy, sampled, constrained, drafted
    seed: int

    def run(self, session: Session, tokenizer: Tokenizer) -> list[int]:
        sampled = Sampling(temperature=1.0, top_k=20, seed=self.seed)
        constraint = Constraint.regex("[a-z ]+(in|the|[0-9]{2})") if self.kind == KINDS[2] else None
        tokens = generate(
            session,
            self.prompt,
            max_new_tokens=self.most,
            sampling=sampled if self.kind == KINDS[1] else Sampling(temperature=0.0),
            stop_tokens=_STOP,
            constraint=constraint.start(tokenizer, _STOP) if constraint else None,
            drafter=PromptLookup() if self.kind == KINDS[3] else None,
        )
        return list(tokens)


KINDS = ("greedy", "sampled", "constrained", "drafted")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--opens", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    options = parser.parse_args()
    bundle, figures = open_bundle(_TINY), Figures()
    tokenizer = Tokenizer(bundle.path("tokenizer"))
    run_long(bundle, tokenizer, options.tokens, options.seed, figures)
    run_at_once(bundle, tokenizer, options.seed, figures)
    run_opens(bundle, options.opens, figures)
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(figures) + b"\n")
    else:
        for name, value in msgspec.structs.asdict(figures).items():
            print(f"{name}: {value}")
    return int(bool(figures.problems))


def run_long(
    bundle: Bundle, tokenizer: Tokenizer, tokens: int, seed: int, figures: Figures
) -> None:
    """One session, so many tokens."""
    chance, early = random.Random(seed), 0
    with open_session(bundle, exact=True) as session:
        while figures.tokens < tokens:
            _go_back(session, chance)
            before, one = list(session.tokens), _choose(session, chance)
            found = one.run(session, tokenizer)
            figures.tokens += len(found)
            figures.rounds += 1
            if figures.rounds % _CHECKED == 0:
                figures.checked += 1
                _compare(bundle, tokenizer, before, one, found, figures)
                print(f"{figures.tokens} of {tokens} tokens", file=sys.stderr)
            if early == 0 and figures.tokens >= tokens // 10:
                early = _resident()
    figures.grown_bytes = _resident() - early
    if figures.grown_bytes > _FLAT:
        figures.problems.append(f"memory grew by {figures.grown_bytes >> 20} MiB")


def run_at_once(bundle: Bundle, tokenizer: Tokenizer, seed: int, figures: Figures) -> None:
    """Sessions in threads of their own give the tokens that they give alone."""
    chance = random.Random(seed)
    rounds = [Round(_prompt(chance, 20), 60, kind, chance.randrange(99)) for kind in KINDS]
    alone = [_fresh(bundle, tokenizer, (), one) for one in rounds]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        together = list(pool.map(lambda one: _fresh(bundle, tokenizer, (), one), rounds * 5))
    if together != alone * 5:
        figures.problems.append("sessions at once gave other tokens than alone")


def run_opens(bundle: Bundle, count: int, figures: Figures) -> None:
    """Sessions that are opened, used and closed."""
    process, start = psutil.Process(), (0, 0, 0)
    for number in range(count):
        with open_session(bundle) as session:
            session.prefill([2, 3, 4])
        figures.opens += 1
        if number == count // 10:
            start = (_resident(), process.num_threads(), _descriptors(process))
    end = (_resident(), process.num_threads(), _descriptors(process))
    grown = [after - before for before, after in zip(start, end, strict=True)]
    figures.grown_by_opens, figures.grown_threads, figures.grown_descriptors = grown
    if grown[0] > _FLAT or grown[1] > 0 or grown[2] > 0:
        figures.problems.append(f"{count} sessions left {grown} bytes, threads and descriptors")


def _go_back(session: Session, chance: random.Random) -> None:
    """Start anew, rewind somewhere, or go on, as long as there is room."""
    if session.position > session.context_length - 30 or chance.random() < 0.3:
        session.reset()
    elif session.position and chance.random() < 0.5:
        session.rewind(chance.randrange(session.position))


def _choose(session: Session, chance: random.Random) -> Round:
    prompt = _prompt(chance, chance.randint(1, 12))
    room = max(1, session.context_length - session.position - len(prompt))
    return Round(prompt, chance.randint(1, room), chance.choice(KINDS), chance.randrange(99))


def _prompt(chance: random.Random, count: int) -> list[int]:
    return [chance.randint(6, 300) for _ in range(count)]


def _compare(
    bundle: Bundle,
    tokenizer: Tokenizer,
    before: Sequence[int],
    one: Round,
    found: list[int],
    figures: Figures,
) -> None:
    if (fresh := _fresh(bundle, tokenizer, before, one)) != found:
        figures.problems.append(f"{one.kind} after {len(before)} tokens: {found}, fresh: {fresh}")


def _fresh(bundle: Bundle, tokenizer: Tokenizer, before: Sequence[int], one: Round) -> list[int]:
    with open_session(bundle, exact=True) as session:
        if before:
            session.prefill(before)
        return one.run(session, tokenizer)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _descriptors(process: psutil.Process) -> int:
    return int(process.num_fds()) if hasattr(process, "num_fds") else 0


if __name__ == "__main__":
    sys.exit(main())
