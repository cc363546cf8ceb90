"""Every version of the runtime must read the bundle in tests/data, and so must the apps."""

import json
from pathlib import Path

from gemma_runtime.bundle import open_bundle
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from gemma_runtime.text.generate import generate

TINY = Path(__file__).parents[1] / "data" / "tiny"


def test_it_passes_verification() -> None:
    assert verify_bundle(open_bundle(TINY), threads=1).verdict is Verdict.PASS


def test_its_exact_graph_generates_the_recorded_tokens() -> None:
    recorded = json.loads(TINY.with_name("tiny_tokens.json").read_text())
    with open_session(open_bundle(TINY), threads=1, exact=True) as session:
        tokens = generate(session, recorded["prompt"], max_new_tokens=len(recorded["tokens"]))
        assert list(tokens) == recorded["tokens"]
        assert len(set(recorded["tokens"])) > 30  # not a model that repeats itself
