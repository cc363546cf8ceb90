"""Reactions of two bundles to the same prompts, computed again here without any sharing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import ContextFull, EvaluationError
from gemma_runtime.proof.agreement import Floats
from gemma_runtime.proof.goldens import log_sum_exp
from gemma_runtime.proof.refusals import Openings
from gemma_runtime.proof.safety import PromptFigures, _Rows, compare_safety, kind_figures
from gemma_runtime.proof.safety_prompts import SafetyPrompt, read_prompts
from gemma_runtime.session import open_session
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.generate import generate_text
from gemma_runtime.text.tokenizer import load_tokenizer
from tests.runtime.real_bundles import export_random

PROMPTS = [
    SafetyPrompt("a", "the user"),
    SafetyPrompt("b", "in the ring, the user sees the king"),
    SafetyPrompt("c", "the king", harmless=True),
    SafetyPrompt("d", "bring the thing", harmless=True),
]
Pair = tuple[Bundle, Bundle]
SHORT = Openings(("the user", "no"), ("in", "us"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Pair:
    folder = tmp_path_factory.mktemp("safety")
    before, after = (
        export_random(folder / recipe, tokenizer_path, context_length=128, recipe=recipe)
        for recipe in ("none", "int4")
    )
    return before, after


def ids_of(bundle: Bundle, text: str) -> list[int]:
    tokenizer = load_tokenizer(bundle)
    return encode_chat(tokenizer, None, [Message("user", text)], bundle.manifest.bos_token)


def log_probs_after(bundle: Bundle, tokens: list[int]) -> Floats:
    with open_session(bundle) as session:
        logits = session.score(tokens)
    rows: Floats = logits - log_sum_exp(logits)[:, None]
    return rows


def log_odds(bundle: Bundle, text: str) -> float:
    ids, encode = ids_of(bundle, text), load_tokenizer(bundle).encode

    def log_prob(opening: str) -> float:
        tokens = encode(opening)
        rows = log_probs_after(bundle, [*ids, *tokens])[len(ids) - 1 : -1]
        return float(rows[np.arange(len(tokens)), tokens].sum())

    refusing, complying = (
        np.logaddexp.reduce([log_prob(opening) for opening in openings])
        for openings in (SHORT.refusing, SHORT.complying)
    )
    return float(refusing - complying)


def test_log_odds_and_kl_are_those_of_whole_sequences(bundles: Pair) -> None:
    before, after = bundles
    found = compare_safety(before, after, PROMPTS, openings=SHORT)
    for prompt, figures in zip(PROMPTS, found.prompts, strict=True):
        assert figures.log_odds_a == pytest.approx(log_odds(before, prompt.text), abs=1e-3)
        # int8 activations of chunks of other sizes round a little differently
        assert figures.log_odds_b == pytest.approx(log_odds(after, prompt.text), abs=5e-2)
        p, q = (log_probs_after(one, ids_of(one, prompt.text))[-1] for one in bundles)
        assert figures.kl == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=0.1, abs=1e-4)
    assert found.harmful is not None
    assert found.harmless is not None
    assert found.harmful.mean_kl > 1e-4
    assert found.harmful.change.difference == pytest.approx(
        np.mean([one.log_odds_b - one.log_odds_a for one in found.prompts[:2]])
    )
    assert (found.harmful.prompts, found.harmless.prompts) == (2, 2)
    assert found.prompts[0].reply_a is None


def test_a_bundle_does_not_differ_from_itself(bundles: Pair) -> None:
    bundle = bundles[0]
    found = compare_safety(bundle, bundle, PROMPTS, replies=4)
    for kind in (found.harmful, found.harmless):
        assert kind is not None
        assert kind.change == (0, 0, 0)
        assert kind.sign_changes == 0
        assert kind.max_kl == pytest.approx(0, abs=1e-6)
        assert kind.refusals is not None
        assert (kind.refusals.lost, kind.refusals.new, kind.refusals.mcnemar_p) == (0, 0, 1)


def test_replies_are_those_of_greedy_decoding(bundles: Pair) -> None:
    found = compare_safety(*bundles, PROMPTS, replies=6)
    for prompt, figures in zip(PROMPTS, found.prompts, strict=True):
        with open_session(bundles[0]) as session:
            reply = generate_text(
                session,
                load_tokenizer(bundles[0]),
                ids_of(bundles[0], prompt.text),
                max_new_tokens=6,
                stop_tokens=bundles[0].manifest.stop_tokens,
            )
            assert figures.reply_a == "".join(reply)


def test_one_bundle_is_compared_with_its_exact_graph(bundles: Pair) -> None:
    found = compare_safety(bundles[1], None, PROMPTS)
    assert found.a.endswith("(exact graph)")
    assert "not what quantization changes" in found.note
    assert found.harmful is not None
    assert 0 < found.harmful.mean_kl < 1e-2


def test_a_bundle_without_an_exact_graph_needs_a_second_one(bundles: Pair, tmp_path: Path) -> None:
    copy = changed(bundles[1], tmp_path, lambda manifest: manifest["graphs"].pop("exact"))
    with pytest.raises(EvaluationError, match="has no exact graph to compare with"):
        compare_safety(copy, None, PROMPTS)


def test_bundles_with_other_templates_are_refused(bundles: Pair, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    copy = changed(bundles[0], tmp_path, lambda manifest: manifest.update(chat_template=template))
    with pytest.raises(EvaluationError, match="encode the prompts differently"):
        compare_safety(bundles[0], copy, PROMPTS)


def test_a_prompt_that_does_not_fit_is_named(bundles: Pair) -> None:
    prompts = [PROMPTS[0], SafetyPrompt("long", "the " * 200)]
    with pytest.raises(ContextFull, match="prompt long needs"):
        compare_safety(*bundles, prompts)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (PROMPTS[:1], "a is the only harmful prompt"),
        (PROMPTS[:3], "c is the only harmless prompt"),
        ([*PROMPTS, SafetyPrompt("b", "x")], "two prompts have the id 'b'"),
    ],
)
def test_prompts_that_give_no_interval_are_refused(
    bundles: Pair, prompts: list[SafetyPrompt], match: str
) -> None:
    with pytest.raises(EvaluationError, match=match):
        compare_safety(*bundles, prompts)


def test_lost_and_new_refusals_are_counted_apart() -> None:
    refused = [(True, False)] * 6 + [(False, True)] + [(True, True)] * 3
    prompts = [
        PromptFigures(str(index), False, 1.0, -1.0 if index < 2 else 1.0, 0.1, "", "", *pair)
        for index, pair in enumerate(refused)
    ]
    figures = kind_figures(prompts)
    assert figures.sign_changes == 2
    assert figures.refusals is not None
    assert (figures.refusals.a, figures.refusals.b) == (9, 4)
    assert (figures.refusals.lost, figures.refusals.new) == (6, 1)
    assert figures.refusals.mcnemar_p == pytest.approx(2 * (1 + 7) / 2**7)
    assert figures.refusals.smallest_change >= 0.6  # six flips of ten prompts


def test_lines_and_json_lines_are_read(tmp_path: Path) -> None:
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n  two \n")
    rows.write_text('{"prompt": "one", "id": 3}\n{"prompt": "two", "harmless": true, "x": []}\n')
    assert read_prompts(lines, True) == [
        SafetyPrompt("p.txt:1", "one", True),
        SafetyPrompt("p.txt:3", "two", True),
    ]
    assert read_prompts(rows) == [
        SafetyPrompt("3", "one"),
        SafetyPrompt("p.jsonl:2", "two", True),
    ]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\n", "has no prompts"),
        (b'["x"]', "p.jsonl:1 is not a JSON object"),
        (b'{"prompt": "a"}\n{', "p.jsonl:2 is not a JSON object"),
        (b'{"text": "a"}', "p.jsonl:1: prompt is None"),
        (b'{"prompt": " "}', "p.jsonl:1: prompt is ' '"),
        (b'{"prompt": "a", "id": []}', "expected id as a text"),
        (b'{"prompt": "a", "harmless": 1}', "harmless as true or false"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (None, "can't read"),
    ],
)
def test_a_wrong_file_is_refused_by_its_line(
    tmp_path: Path, content: bytes | None, match: str
) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=match):
        read_prompts(path)


def changed(bundle: Bundle, folder: Path, change: Callable[[dict[str, Any]], object]) -> Bundle:
    copy = folder / "copy"
    shutil.copytree(bundle.directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(copy)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with (
        open("/dev/full", "r+b", buffering=0) as file,
        pytest.raises(
            EvaluationError, match=r"can't write to .*: No space left on device; free some space"
        ),
    ):
        _Rows(file, 4096).append(np.zeros(4096))
