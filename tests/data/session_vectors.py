"""Writes what sessions do with rings that layers share, and with drafts, for the phones' ports.

    python -m tests.data.session_vectors

The sessions are ONNX Runtime's, over a model that is a formula, which the ports repeat. Layers are
[window, slots, source].
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gemma_runtime.backends.ort import OrtSession
from gemma_runtime.bundle import open_bundle
from gemma_runtime.manifest import AttentionKind, LayerCache, Manifest
from gemma_runtime.session import Logits
from gemma_runtime.text.draft import PromptLookup
from gemma_runtime.text.generate import generate
from gemma_runtime.text.sampler import Sampling

VECTORS = Path(__file__).with_name("session_vectors.json")
TINY = Path(__file__).with_name("tiny")
VOCABULARY, CONTEXT = 24, 96
Layers: TypeAlias = list[list[int | None]]

RING: Layers = [[8, 20, None]]
SHARED: Layers = [[8, 20, None], [8, 20, 0]]
TWO_RINGS: Layers = [[8, 20, None], [5, 12, None], [8, 20, 0], [5, 12, 1], [None, 96, None]]
NARROW: Layers = [[8, 9, None], [8, 9, 0]]
WHOLE: Layers = [[8, 96, None], [8, 96, 0]]
PROMPT = [2, 9, 4, 17, 3, 8, 9, 4, 17, 3, 8, 9, 4]
QUOTED = [23, 22, 17, 16, 11, 10, 5, 2, 2, 2, 2, 9, 4]  # the reply begins in the same way


class Formula(OrtSession):
    """Writes down how many tokens each run gets, and how many rows it returns."""

    def __init__(self, manifest: Manifest) -> None:
        super(OrtSession, self).__init__(manifest)
        self._logits = np.empty((1, VOCABULARY), np.float32)
        self.runs: list[list[int]] = []

    def _run(self, chunk: Sequence[int], wanted: Sequence[int], logits: Logits) -> None:
        self.runs.append([len(chunk), len(wanted)])
        self._tokens += chunk
        start = self.position - len(chunk)
        for row, place in enumerate(wanted):
            logits[row] = formula(self._tokens[: start + place + 1])


def formula(tokens: Sequence[int]) -> Logits:
    """Most tokens follow in a cycle, but every eleventh does not. No two logits are equal."""
    last, before = tokens[-1], tokens[-2] if len(tokens) > 1 else 0
    ids = np.arange(VOCABULARY)
    logits = ((7 * before + 13 * last + 11 * ids) % 31).astype(np.float32)
    logits[(5 * last + 3 + (len(tokens) % 11 == 0)) % VOCABULARY] += 31
    return logits


def manifest_of(layers: Layers, context: int, prefill: int) -> Manifest:
    caches = tuple(
        LayerCache(
            kind=AttentionKind.GLOBAL if window is None else AttentionKind.LOCAL,
            window=window,
            slots=slots or 0,
            kv_heads=1,
            head_dim=4,
            source=source,
        )
        for window, slots, source in layers
    )
    return replace(
        open_bundle(TINY).manifest,
        layers=caches,
        vocab_size=VOCABULARY,
        context_length=context,
        prefill_length=prefill,
    )


def scored() -> Iterator[dict[str, object]]:
    for layers in (RING, SHARED, TWO_RINGS, NARROW, WHOLE):
        for prefill, before, count in ((16, 0, 60), (16, 23, 37), (4, 20, 30), (16, 95, 1)):
            session = Formula(manifest_of(layers, CONTEXT, prefill))
            session.prefill([2] * before) if before else None
            session.runs.clear()
            session.score([2] * count)
            yield {
                "layers": layers,
                "context": CONTEXT,
                "prefill": prefill,
                "before": before,
                "count": count,
                "runs": session.runs,
            }


def drafts() -> Iterator[dict[str, object]]:
    yield _drafted(WHOLE, new=60)
    yield _drafted(WHOLE, new=1)
    yield _drafted(WHOLE, new=60, penalty=2.5)
    yield _drafted(RING, new=70)
    yield _drafted(SHARED, new=70)
    yield _drafted(NARROW, new=60)  # nothing can be taken back
    yield _drafted(TWO_RINGS, new=200, prefill=4)  # to a full context; runs exceed a chunk
    yield _drafted(RING, QUOTED, new=60, stop=16)  # which is guessed


def _drafted(
    layers: Layers,
    prompt: Sequence[int] = PROMPT,
    *,
    new: int,
    prefill: int = 16,
    penalty: float = 1.0,
    stop: int = VOCABULARY,
) -> dict[str, object]:
    def run(drafter: PromptLookup | None) -> tuple[list[int], Formula]:
        session = Formula(manifest_of(layers, CONTEXT, prefill))
        sampling = Sampling(repetition_penalty=penalty)
        tokens = generate(
            session,
            prompt,
            max_new_tokens=new,
            sampling=sampling,
            stop_tokens=[stop],
            drafter=drafter,
        )
        return list(tokens), session

    tokens, session = run(PromptLookup())
    expected, plain = run(None)
    assert tokens == expected
    return {
        "layers": layers,
        "context": CONTEXT,
        "prefill": prefill,
        "prompt": prompt,
        "max_new_tokens": new,
        "repetition_penalty": penalty,
        "stop_token": stop,
        "tokens": tokens,
        "runs": session.runs,
        "plain_runs": len(plain.runs),
        "position": session.position,
    }


def vectors() -> dict[str, list[dict[str, object]]]:
    return {"scored": list(scored()), "drafts": list(drafts())}


def _text() -> str:
    parts = (
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, cases)) + "\n]"
        for name, cases in vectors().items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    VECTORS.write_text(_text(), "utf-8")
