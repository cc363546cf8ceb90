from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from rich.console import Console

from gemma_runtime.backend_table import Limits
from gemma_runtime.errors import BundleError, ContextFull
from gemma_runtime.proof.agreement import pool
from gemma_runtime.proof.goldens import Golden, TopLogits, top_logits
from gemma_runtime.proof.verify import (
    Verdict,
    Verification,
    compare_sessions,
    measure_lowering,
    render_verification,
    replay,
    verify,
)
from gemma_runtime.session import FakeSession, Logits

VOCABULARY = 64
LENGTH = 16
Script = Callable[[Sequence[int]], Logits]


def test_a_session_with_the_goldens_logits_passes() -> None:
    verification = verify(FakeSession(_model), _goldens())

    assert verification.verdict is Verdict.PASS
    assert verification.failures == ()
    assert verification.lowering.top1 == verification.paths.top1 == 1
    assert verification.lowering.mean_kl == pytest.approx(0, abs=1e-6)


def test_every_position_is_scored_and_half_of_them_decoded() -> None:
    verification = verify(FakeSession(_model), _goldens(3))

    assert verification.scored.positions == verification.paths.positions * 16 // 9 == 3 * LENGTH
    assert verification.decoded.positions == 3 * (LENGTH // 2 + 1)
    assert (
        verification.lowering.positions
        == verification.scored.positions + verification.decoded.positions
    )
    assert {name: part.positions for name, part in verification.by_golden.items()} == {
        f"golden {index}": LENGTH + LENGTH // 2 + 1 for index in range(3)
    }


def test_quantization_error_is_reported_but_does_not_fail() -> None:
    with_other_reference = [
        Golden(golden.name, golden.tokens, _tops(_other_model, golden.tokens), golden.quantized)
        for golden in _goldens()
    ]

    verification = verify(FakeSession(_model), with_other_reference)

    assert verification.quantization.top1 < 0.2
    assert verification.quantization.mean_kl > 1
    assert verification.verdict is Verdict.PASS


def test_another_model_fails_every_limit() -> None:
    verification = verify(FakeSession(_other_model), _goldens())

    assert verification.verdict is Verdict.FAIL
    assert [failure.split(" is ")[0] for failure in verification.failures] == [
        "top-1 outside near ties",
        "mean KL of scoring",
        "mean KL of decoding",
    ]
    assert verification.paths.mean_kl == pytest.approx(0, abs=1e-6)  # both wrong in the same way


class _WrongDecode(FakeSession):
    """Right when scoring; `decode` adds noise."""

    def __init__(self, noise: float) -> None:
        super().__init__(_model)
        self._noise = noise

    def decode(self, token: int) -> Logits:
        return _noisy(super().decode(token), self.tokens, self._noise)


class _StaleDecode(FakeSession):
    """`decode` ignores the last but one token, as if the cache were written one slot late."""

    def decode(self, token: int) -> Logits:
        super().decode(token)
        return _model([*self.tokens[:-2], self.tokens[-1]])


class _WrongScore(FakeSession):
    """Right at the last position of a call; `score` adds noise to all others."""

    def score(self, tokens: Sequence[int]) -> Logits:
        logits = super().score(tokens)
        rows = [_noisy(row, [index], 0.5) for index, row in enumerate(logits)]
        return np.stack([*rows[:-1], logits[-1]])


@pytest.mark.parametrize(
    "make",
    [lambda: _WrongDecode(0.5), lambda: _StaleDecode(_model)],
    ids=["noise", "stale cache"],
)
def test_a_session_that_is_wrong_only_in_decode_fails(make: Callable[[], FakeSession]) -> None:
    verification = verify(make(), _goldens())

    assert verification.verdict is Verdict.FAIL
    assert verification.scored.mean_kl == pytest.approx(0, abs=1e-6)
    assert any("of decoding is" in failure for failure in verification.failures)
    assert any("decoding against scoring" in failure for failure in verification.failures)


def test_a_session_that_is_wrong_only_in_scoring_fails() -> None:
    verification = verify(_WrongScore(_model), _goldens())

    assert verification.verdict is Verdict.FAIL
    assert any("of scoring" in failure for failure in verification.failures)
    assert verification.decoded.mean_kl == pytest.approx(0, abs=1e-6)


def test_noise_below_the_limits_passes() -> None:
    verification = verify(_WrongDecode(0.02), _goldens())

    assert verification.verdict is Verdict.PASS
    assert 0 < verification.decoded.mean_kl < verification.limits.max_mean_kl


def test_the_caller_can_set_the_limits() -> None:
    strict = Limits(max_mean_kl=1e-9)

    verification = verify(_WrongDecode(0.02), _goldens(), strict)

    assert (verification.verdict, verification.limits) == (Verdict.FAIL, strict)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 9])
def test_nan_and_infinity_fail(value: float, position: int) -> None:
    """At an early position, which is only scored, and at a late one, which is decoded too."""

    def broken(tokens: Sequence[int]) -> Logits:
        logits = _model(tokens)
        if len(tokens) - 1 == position:
            logits[:] = value
        return logits

    assert verify(FakeSession(broken), _goldens()).verdict is Verdict.FAIL


def test_many_near_ties_that_go_the_other_way_are_ambiguous() -> None:
    """No limit is exceeded, but nothing is proved: the two leading tokens tie everywhere."""

    def swapped(tokens: Sequence[int]) -> Logits:
        logits = _tied_model(tokens)
        first, second = np.argsort(-logits)[:2]
        logits[[first, second]] = logits[[second, first]]
        return logits

    verification = verify(FakeSession(swapped), _goldens(script=_tied_model))

    assert verification.failures == ()
    assert verification.verdict is Verdict.AMBIGUOUS
    assert verification.lowering.top1 == 0
    assert verification.lowering.near_ties == verification.lowering.positions
    assert "100% of the positions are near ties" in _rendered(verification)


def test_near_ties_that_go_the_same_way_pass() -> None:
    verification = verify(FakeSession(_tied_model), _goldens(script=_tied_model))

    assert verification.verdict is Verdict.PASS


def test_an_exceeded_limit_fails_despite_many_near_ties() -> None:
    def swapped(tokens: Sequence[int]) -> Logits:
        return np.roll(_tied_model(tokens), 1)

    verification = verify(FakeSession(swapped), _goldens(script=_tied_model))

    assert verification.verdict is Verdict.FAIL


def test_verify_resets_the_session_before_and_after() -> None:
    session = FakeSession(_model)
    session.prefill([1, 2, 3])

    assert verify(session, _goldens()).verdict is Verdict.PASS
    assert session.position == 0


@pytest.mark.parametrize("unjudged", [0, 1, 5])
@pytest.mark.parametrize("judged", [1, 2, 3, 8])
def test_replay_scores_the_judged_positions_and_decodes_the_second_half(
    judged: int, unjudged: int
) -> None:
    tokens = _tokens(0)[: unjudged + judged]
    top = _tops(_model, tokens)
    last = TopLogits(top.ids[unjudged:], top.logits[unjudged:], top.log_sum_exp[unjudged:])

    scored, decoded = replay(FakeSession(_model), Golden("last", tokens, last, last))

    assert len(scored) == judged
    assert len(decoded) == judged - max(1, judged // 2) + 1
    assert np.array_equal(scored[-len(decoded) :], decoded)
    assert scored.argmax(-1).tolist() == [row[0] for row in last.ids]


def test_a_fault_that_rounding_hides_fails_with_float_activations() -> None:
    slightly_off = measure_lowering(_WrongDecode(0.02), _goldens())

    assert verify(FakeSession(_model), _goldens()).exact is None
    verification = verify(FakeSession(_model), _goldens(), exact=slightly_off)

    assert verification.verdict is Verdict.FAIL
    assert [failure.split(" is ")[0] for failure in verification.failures] == [
        "mean KL of the float kernels"
    ]
    assert slightly_off.mean_kl < verification.limits.max_mean_kl


def test_engines_that_disagree_on_one_artifact_fail() -> None:
    """On macOS, Core ML is also compared with our interpreter."""
    same = compare_sessions(FakeSession(_model), FakeSession(_model), _goldens())
    assert verify(FakeSession(_model), _goldens(), engines=same).verdict is Verdict.PASS
    different = compare_sessions(FakeSession(_model), FakeSession(_other_model), _goldens())
    verification = verify(FakeSession(_model), _goldens(), engines=different)
    assert verification.verdict is Verdict.FAIL
    assert any("Core ML against ours" in failure for failure in verification.failures)


def test_verifying_without_goldens_is_refused() -> None:
    with pytest.raises(BundleError, match="no goldens"):
        verify(FakeSession(_model), [])


def test_a_golden_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ContextFull):
        verify(FakeSession(_model, context_length=LENGTH - 1), _goldens())


@pytest.mark.parametrize("name", ["plain", "[red]x", "out/[/y]"])
def test_the_table_shows_every_figure_in_80_columns(name: str) -> None:
    """Labels were cut, and a folder's name was parsed as markup."""
    text = _rendered(verify(FakeSession(_model), _goldens()), name)

    assert f"{name}: PASS" in text
    for words in ("whole prompts", "token by token", "one vs the other", "quantization"):
        assert words in text
    assert text.splitlines()[2].split() == ["tokens", "top-1", "ties", "|Δ|", "|Δ|", "KL", "KL"]
    assert "…" not in text


def test_the_golden_that_quantization_hurts_most_is_named() -> None:
    """The mean over all goldens hides it."""
    hurt = _goldens(3)
    hurt[1] = replace(hurt[1], reference=_tops(_other_model, hurt[1].tokens))

    verification = verify(FakeSession(_model), hurt)

    by_golden = verification.quantization_by_golden
    assert pool([*by_golden.values()]) == verification.quantization
    assert by_golden["golden 1"].mean_kl > 2 * verification.quantization.mean_kl > 0
    (line,) = (line for line in _rendered(verification).splitlines() if "worst" in line)
    assert line.split()[:3] == ["worst:", "golden", "1"]
    assert f"{by_golden['golden 1'].mean_kl:.1e}" in line
    assert "by language: gemma-runtime eval" in " ".join(_rendered(verification).split())
    assert "worst:" not in _rendered(verify(FakeSession(_model), hurt[:1]))


def test_failures_are_shown_below_the_table() -> None:
    verification = verify(FakeSession(_other_model), _goldens())

    text = _rendered(verification)

    assert "bundle: FAIL" in text
    assert "top-1 outside near ties is" in text
    assert "mean KL of decoding is" in text


def test_a_verification_survives_json() -> None:
    verification = verify(FakeSession(_model), _goldens())

    assert msgspec.json.decode(msgspec.json.encode(verification), type=Verification) == verification


def _rendered(verification: Verification, name: str = "bundle") -> str:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(render_verification(name, verification))
    return capture.get()


def _goldens(count: int = 2, script: Script | None = None) -> list[Golden]:
    model = script or _model
    return [
        Golden(f"golden {index}", tokens, _tops(model, tokens), _tops(model, tokens))
        for index, tokens in enumerate(_tokens(index) for index in range(count))
    ]


def _tops(script: Script, tokens: Sequence[int]) -> TopLogits:
    return top_logits(FakeSession(script).score(tokens))


def _tokens(seed: int) -> list[int]:
    draw = np.random.default_rng(seed).integers(0, VOCABULARY, LENGTH)
    return [int(token) for token in draw]


def _model(tokens: Sequence[int]) -> Logits:
    """Logits that depend on every token so far, with a clear most likely token."""
    return _draw([1, *tokens])


def _other_model(tokens: Sequence[int]) -> Logits:
    return _draw([2, *tokens])


def _tied_model(tokens: Sequence[int]) -> Logits:
    """Like `_model`, but the two most likely tokens are closer than the tie margin."""
    logits = _model(tokens)
    first, second = np.argsort(-logits)[:2]
    logits[second] = logits[first] - 0.01
    return logits


def _draw(seed: Sequence[int]) -> Logits:
    logits = np.random.default_rng(list(seed)).normal(0, 2, VOCABULARY).astype(np.float32)
    logits[logits.argmax()] += 3
    return logits


def _noisy(logits: Logits, seed: Sequence[int], noise: float) -> Logits:
    drawn = np.random.default_rng(list(seed)).normal(0, noise, logits.shape)
    return (logits + drawn).astype(np.float32)
