"""Scoring one text: the noise of rounding, and how text is measured."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_runtime.proof.evaluate import score_text
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.tokenizer import Tokenizer

VOCABULARY = 50
Floats = NDArray[np.float64]


def logits_after(tokens: Sequence[int]) -> Logits:
    generator = np.random.default_rng(len(tokens) * 1000 + tokens[-1])
    return generator.standard_normal(VOCABULARY).astype(np.float32)


class Rounding(FakeSession):
    """Its logits for a chunk of one token are others, as those of quantized kernels are."""

    def score(self, tokens: Sequence[int]) -> Logits:
        logits = super().score(tokens)
        return logits * np.float32(1.1) if len(tokens) == 1 else logits


def log_softmax(logits: Logits) -> Floats:
    wide = logits.astype(np.float64)
    log_p: Floats = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    return log_p


def test_noise_compares_chunks_with_single_tokens(tokenizer: Tokenizer) -> None:
    tokens = [2, *range(10, 49)]
    text = score_text(Rounding(logits_after), tokenizer, "en", tokens, None, noise=True)
    in_chunks = np.stack([logits_after(tokens[: n + 1]) for n in range(len(tokens))])
    log_p, log_q = log_softmax(in_chunks * np.float32(1.1)), log_softmax(in_chunks)
    assert text.noise is not None
    np.testing.assert_allclose(text.noise.kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-4)
    rows = np.arange(len(tokens) - 1)
    np.testing.assert_allclose(text.next_log_probs, log_q[rows, tokens[1:]], rtol=1e-5)
    np.testing.assert_allclose(text.noise.reference_log_probs, log_p[rows, tokens[1:]], rtol=1e-5)
    assert text.noise.same.all()


def test_a_session_that_rounds_all_chunks_alike_has_no_noise(tokenizer: Tokenizer) -> None:
    tokens = [2, *range(10, 49)]
    text = score_text(FakeSession(logits_after), tokenizer, "en", tokens, None, noise=True)
    assert text.noise is not None
    assert np.abs(text.noise.kl).max() < 1e-6
    assert score_text(FakeSession(logits_after), tokenizer, "en", tokens, None, False).noise is None


@pytest.mark.parametrize("text", ["the user", "größer", "日本", "the 🦊"])
def test_bytes_and_characters_of_a_text(tokenizer: Tokenizer, text: str) -> None:
    """Characters that the vocabulary lacks are byte tokens: a character is several tokens."""
    session = FakeSession(lambda _: np.zeros(1000, np.float32))
    scored = score_text(session, tokenizer, "en", [2, *tokenizer.encode(text)], None, False)
    assert (scored.bytes, scored.characters) == (len(text.encode()), len(text))
    assert len(scored.next_log_probs) == len(tokenizer.encode(text))
