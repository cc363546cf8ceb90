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

from rich.console import Console
from rich.table import Table

from gemma_runtime import (
    Bundle,
    Generation,
    Session,
    Tokenizer,
    generate_text,
    load_tokenizer,
    open_bundle,
    open_session,
)
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
    same: int  # prompts whose text is that without drafts
    total: int
    seconds_ratio: float  # plain / drafted, median over prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    with open_session(bundle, options.threads) as session:
        model = _Model(bundle, load_tokenizer(bundle), session)
        figures = [
            _measure(model, name, texts) for name, texts in (("copying", COPYING), ("other", OTHER))
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


def _measure(model: "_Model", name: str, texts: Sequence[str]) -> Figures:
    new = steps = same = 0
    ratios = []
    for text in texts:
        plain, drafted = model.reply(text, None), model.reply(text, PromptLookup())
        new, steps = new + drafted.new_tokens - 1, steps + drafted.steps
        same += plain.text == drafted.text
        ratios.append(_seconds_per_token(plain) / _seconds_per_token(drafted))
    return Figures(name, new, steps, same, len(texts), median(ratios))


def _seconds_per_token(result: Generation) -> float:
    """After the first token."""
    return (result.seconds - result.first_token_seconds) / result.new_tokens


@dataclass(frozen=True, slots=True)
class _Model:
    bundle: Bundle
    tokenizer: Tokenizer
    session: Session

    def reply(self, text: str, drafter: PromptLookup | None) -> Generation:
        self.session.reset()
        generation = generate_text(
            self.session,
            self.tokenizer,
            [self.bundle.manifest.bos_token, *self.tokenizer.encode(text)],
            max_new_tokens=_NEW_TOKENS,
            drafter=drafter,
        )
        list(generation)
        return generation.result


if __name__ == "__main__":
    main()
