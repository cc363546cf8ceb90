"""Measures how many steps drafts save where a reply copies from its prompt, and what they cost.

    python benchmarks/drafting.py out/gemma-3-270m-demo

Ten prompts of four kinds: sentences quoted from a text, data rewritten as JSON, small edits of
code, and lists continued; and four prompts that repeat nothing. Each is continued greedily with and
without drafts, in turns. Steps don't depend on how busy the machine is; seconds do.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from gemma_runtime import Session, generate, load_tokenizer, open_bundle, open_session
from gemma_runtime.text.draft import PromptLookup

_NEW_TOKENS = 96
_ARTICLE = (
    "The lighthouse at Cape Sorrow was built in 1871 by the engineer Anna Lindqvist. Its lamp "
    "could be seen for forty kilometres. In 1923 a storm broke the lower gallery, and the keeper "
    "lived in the lamp room for three weeks. Today the tower is a museum with twelve rooms."
)
_CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n"
)
_TABLE = (
    "name: Ana, age: 31, city: Porto\nname: Bo, age: 45, city: Malmö\n"
    "name: Chi, age: 28, city: Hue\n"
)
COPYING = (
    f"{_ARTICLE}\n\nThe text again, word for word:\n",
    f"Text: {_ARTICLE}\n\nThe first two sentences of the text are: \"The lighthouse",
    f"{_ARTICLE}\n\nSummary, with sentences taken from the text: In 1923",
    f"{_TABLE}\nAs JSON:\n[{{\"name\": \"Ana\", \"age\": 31, \"city\": \"Porto\"}},",
    f"{_TABLE}\nSorted by age:\nname: Chi, age: 28, city: Hue\n",
    f"{_CODE}\n# The same function with the name average:\ndef average(values):\n",
    f"{_CODE}\n# The same function, which skips None:\ndef mean(values):\n    total = 0\n",
    "<ul>\n<li>apple</li>\n<li>pear</li>\n<li>plum</li>\n<li>cherry</li>\n",
    "2024-01-01 open\n2024-01-02 open\n2024-01-03 closed\n2024-01-04 open\n2024-01-05",
    'Q: Say "good morning" in French.\nA: "bonjour"\nQ: Say "good night" in French.\nA:',
)  # fmt: skip
OTHER = (
    "Once upon a time, in a village by the sea,",
    "The three most important ideas of thermodynamics are",
    "Dear Sir or Madam,",
    "Die Geschichte der Stadt beginnt",
)


@dataclass(frozen=True, slots=True)
class Figures:
    prompts: str
    new_tokens: int
    steps: int  # with drafts; without, one per token
    fed: int  # tokens in these steps, guesses included
    same: int  # prompts whose tokens are those without drafts
    total: int
    seconds_ratio: float  # plain / drafted, median over prompts


class Counting:
    """Passes a session's calls on, and counts them and their tokens."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.steps = self.fed = 0

    def __getattr__(self, name: str) -> object:
        call = getattr(self._session, name)
        if name not in ("decode", "score"):
            return call

        def counted(tokens: int | Sequence[int]) -> object:
            self.steps += 1
            self.fed += 1 if isinstance(tokens, int) else len(tokens)
            return call(tokens)

        return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    tokenizer, bos = load_tokenizer(bundle), bundle.manifest.bos_token
    with open_session(bundle, options.threads) as session:
        figures = [
            _measure(session, name, [[bos, *tokenizer.encode(text)] for text in texts])
            for name, texts in (("copying", COPYING), ("other", OTHER))
        ]
    if options.json:
        print(json.dumps([asdict(one) for one in figures]))
        return
    table = Table("prompts", "tokens", "steps", "tokens a step", "same text", "speed-up", box=None)
    for one in figures:
        table.add_row(
            one.prompts,
            f"{one.new_tokens}",
            f"{one.steps}",
            f"{one.new_tokens / one.steps:.2f}",
            f"{one.same} of {one.total}",
            f"{one.seconds_ratio:.2f}",
        )
    Console().print(table)


def _measure(session: Session, name: str, prompts: Sequence[Sequence[int]]) -> Figures:
    new = steps = fed = same = 0
    ratios = []
    for prompt in prompts:
        plain, seconds, _ = _run(session, prompt, None)
        drafted, less, counted = _run(session, prompt, PromptLookup())
        new, steps, fed = new + len(drafted) - 1, steps + counted.steps, fed + counted.fed
        same += plain == drafted
        ratios.append(seconds / len(plain) / (less / len(drafted)))
    return Figures(name, new, steps, fed, same, len(prompts), median(ratios))


def _run(
    session: Session, prompt: Sequence[int], drafter: PromptLookup | None
) -> tuple[list[int], float, Counting]:
    """The new tokens, the seconds after the first one, and the counted calls."""
    session.reset()
    counted = Counting(session)
    tokens = generate(counted, prompt, max_new_tokens=_NEW_TOKENS, drafter=drafter)  # type: ignore[arg-type]
    first = next(tokens)
    started = perf_counter()
    return [first, *tokens], perf_counter() - started, counted


if __name__ == "__main__":
    main()
