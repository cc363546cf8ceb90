"""The bundle in tests/data: every version of the runtime goes on reading it, and so do the apps."""

import json
from pathlib import Path

from gemma_runtime.bundle import open_bundle
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from gemma_runtime.text.generate import generate

TINY = Path(__file__).parents[1] / "data" / "tiny"


def test_it_opens_and_says_what_its_goldens_say() -> None:
    assert verify_bundle(open_bundle(TINY), threads=1).verdict is Verdict.PASS


def test_its_float_kernels_go_on_saying_the_same_tokens() -> None:
    said = json.loads(TINY.with_name("tiny_tokens.json").read_text())
    with open_session(open_bundle(TINY), threads=1, exact=True) as session:
        tokens = generate(session, said["prompt"], max_new_tokens=len(said["tokens"]))
        assert list(tokens) == said["tokens"]
        assert len(set(said["tokens"])) > 30  # a model that repeats itself would prove little
