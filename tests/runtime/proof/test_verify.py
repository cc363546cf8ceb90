from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from rich.console import Console

from gemma_runtime.backends import Limits
from gemma_runtime.errors import BundleError, ContextFull
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


def test_a_session_that_says_what_the_goldens_say_passes() -> None:
    found = verify(FakeSession(_model), _goldens())

    assert found.verdict is Verdict.PASS
    assert found.failures == ()
    assert found.lowering.top1 == found.paths.top1 == 1
    assert found.lowering.mean_kl == pytest.approx(0, abs=1e-6)


def test_every_position_is_scored_and_half_of_them_decoded() -> None:
    found = verify(FakeSession(_model), _goldens(3))

    assert found.scored.positions == found.paths.positions * 16 // 9 == 3 * LENGTH
    assert found.decoded.positions == 3 * (LENGTH // 2 + 1)
    assert found.lowering.positions == found.scored.positions + found.decoded.positions
    assert {name: part.positions for name, part in found.by_golden.items()} == {
        f"golden {place}": LENGTH + LENGTH // 2 + 1 for place in range(3)
    }


def test_quantization_is_reported_and_not_judged() -> None:
    far = [
        Golden(golden.name, golden.tokens, _tops(_other_model, golden.tokens), golden.quantized)
        for golden in _goldens()
    ]

    found = verify(FakeSession(_model), far)

    assert found.quantization.top1 < 0.2
    assert found.quantization.mean_kl > 1
    assert found.verdict is Verdict.PASS


def test_another_model_fails_by_every_figure() -> None:
    found = verify(FakeSession(_other_model), _goldens())

    assert found.verdict is Verdict.FAIL
    assert [failure.split(" is ")[0] for failure in found.failures] == [
        "top-1 outside near ties",
        "mean KL of scoring",
        "mean KL of decoding",
    ]
    assert found.paths.mean_kl == pytest.approx(0, abs=1e-6)  # wrong alike


class _WrongDecode(FakeSession):
    """Says all that is right in long calls, and in calls of one token something slightly off."""

    def __init__(self, noise: float) -> None:
        super().__init__(_model)
        self._noise = noise

    def decode(self, token: int) -> Logits:
        return _noisy(super().decode(token), self.tokens, self._noise)


class _StaleDecode(FakeSession):
    """Forgets, on decoding, the token before the last: a cache written one slot late."""

    def decode(self, token: int) -> Logits:
        super().decode(token)
        return _model([*self.tokens[:-2], self.tokens[-1]])


class _WrongScore(FakeSession):
    """Says all that is right in the last position of a call, and something off in the others."""

    def score(self, tokens: Sequence[int]) -> Logits:
        logits = super().score(tokens)
        rows = [_noisy(row, [place], 0.5) for place, row in enumerate(logits)]
        return np.stack([*rows[:-1], logits[-1]])


@pytest.mark.parametrize(
    "make",
    [lambda: _WrongDecode(0.5), lambda: _StaleDecode(_model)],
    ids=["noise", "stale cache"],
)
def test_a_session_wrong_in_decode_alone_fails(make: Callable[[], FakeSession]) -> None:
    found = verify(make(), _goldens())

    assert found.verdict is Verdict.FAIL
    assert found.scored.mean_kl == pytest.approx(0, abs=1e-6)
    assert any("of decoding is" in failure for failure in found.failures)
    assert any("decoding against scoring" in failure for failure in found.failures)


def test_a_session_wrong_in_scoring_alone_fails() -> None:
    found = verify(_WrongScore(_model), _goldens())

    assert found.verdict is Verdict.FAIL
    assert any("of scoring" in failure for failure in found.failures)
    assert found.decoded.mean_kl == pytest.approx(0, abs=1e-6)


def test_noise_below_the_limits_passes() -> None:
    found = verify(_WrongDecode(0.02), _goldens())

    assert found.verdict is Verdict.PASS
    assert 0 < found.decoded.mean_kl < found.limits.max_mean_kl


def test_limits_are_the_callers() -> None:
    strict = Limits(max_mean_kl=1e-9)

    found = verify(_WrongDecode(0.02), _goldens(), strict)

    assert (found.verdict, found.limits) == (Verdict.FAIL, strict)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 9])
def test_a_number_that_is_none_fails(value: float, place: int) -> None:
    """In an early position, seen by scoring alone, and in a late one."""

    def broken(tokens: Sequence[int]) -> Logits:
        logits = _model(tokens)
        if len(tokens) - 1 == place:
            logits[:] = value
        return logits

    assert verify(FakeSession(broken), _goldens()).verdict is Verdict.FAIL


def test_near_ties_that_fall_the_other_way_are_ambiguous() -> None:
    """No limit is broken, and nothing is proved: the two leading tokens are alike everywhere."""

    def swapped(tokens: Sequence[int]) -> Logits:
        logits = _tied_model(tokens)
        first, second = np.argsort(-logits)[:2]
        logits[[first, second]] = logits[[second, first]]
        return logits

    found = verify(FakeSession(swapped), _goldens(script=_tied_model))

    assert found.failures == ()
    assert found.verdict is Verdict.AMBIGUOUS
    assert found.lowering.top1 == 0
    assert found.lowering.near_ties == found.lowering.positions
    assert "100% of the positions are near ties" in _rendered(found)


def test_near_ties_that_fall_alike_pass() -> None:
    found = verify(FakeSession(_tied_model), _goldens(script=_tied_model))

    assert found.verdict is Verdict.PASS


def test_a_broken_limit_is_a_failure_however_many_near_ties_there_are() -> None:
    def swapped(tokens: Sequence[int]) -> Logits:
        return np.roll(_tied_model(tokens), 1)

    found = verify(FakeSession(swapped), _goldens(script=_tied_model))

    assert found.verdict is Verdict.FAIL


def test_the_session_is_empty_before_and_after() -> None:
    session = FakeSession(_model)
    session.prefill([1, 2, 3])

    assert verify(session, _goldens()).verdict is Verdict.PASS
    assert session.position == 0


@pytest.mark.parametrize("unjudged", [0, 1, 5])
@pytest.mark.parametrize("judged", [1, 2, 3, 8])
def test_replay_scores_the_judged_positions_and_decodes_from_the_half_on(
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
    found = verify(FakeSession(_model), _goldens(), exact=slightly_off)

    assert found.verdict is Verdict.FAIL
    assert [failure.split(" is ")[0] for failure in found.failures] == [
        "mean KL of the float kernels"
    ]
    assert slightly_off.mean_kl < found.limits.max_mean_kl


def test_engines_that_disagree_on_one_artifact_fail() -> None:
    """What macOS adds: Core ML beside our interpreter, each of them within its own limits."""
    alike = compare_sessions(FakeSession(_model), FakeSession(_model), _goldens())
    assert verify(FakeSession(_model), _goldens(), engines=alike).verdict is Verdict.PASS
    apart = compare_sessions(FakeSession(_model), FakeSession(_other_model), _goldens())
    found = verify(FakeSession(_model), _goldens(), engines=apart)
    assert found.verdict is Verdict.FAIL
    assert any("Core ML against ours" in failure for failure in found.failures)


def test_no_goldens_prove_nothing() -> None:
    with pytest.raises(BundleError, match="no goldens"):
        verify(FakeSession(_model), [])


def test_a_golden_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ContextFull):
        verify(FakeSession(_model, context_length=LENGTH - 1), _goldens())


@pytest.mark.parametrize("name", ["plain", "[red]x", "out/[/y]"])
def test_the_table_shows_every_figure_on_80_columns(name: str) -> None:
    """Labels were cut, and a folder's name was read as markup."""
    text = _rendered(verify(FakeSession(_model), _goldens()), name)

    assert f"{name}: PASS" in text
    for words in ("whole prompts", "token by token", "one vs the other", "quantization"):
        assert words in text
    assert text.splitlines()[2].split() == ["tokens", "top-1", "ties", "|Δ|", "|Δ|", "KL", "KL"]
    assert "…" not in text


def test_a_failure_is_told_below_the_table() -> None:
    found = verify(FakeSession(_other_model), _goldens())

    text = _rendered(found)

    assert "bundle: FAIL" in text
    assert "top-1 outside near ties is" in text
    assert "mean KL of decoding is" in text


def test_json_brings_the_verification_back() -> None:
    found = verify(FakeSession(_model), _goldens())

    assert msgspec.json.decode(msgspec.json.encode(found), type=Verification) == found


def _rendered(found: Verification, name: str = "bundle") -> str:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(render_verification(name, found))
    return capture.get()


def _goldens(count: int = 2, script: Script | None = None) -> list[Golden]:
    said = script or _model
    return [
        Golden(f"golden {place}", tokens, _tops(said, tokens), _tops(said, tokens))
        for place, tokens in enumerate(_tokens(place) for place in range(count))
    ]


def _tops(script: Script, tokens: Sequence[int]) -> TopLogits:
    return top_logits(FakeSession(script).score(tokens))


def _tokens(seed: int) -> list[int]:
    draw = np.random.default_rng(seed).integers(0, VOCABULARY, LENGTH)
    return [int(token) for token in draw]


def _model(tokens: Sequence[int]) -> Logits:
    """Logits that hang on every token so far, with a clear leader."""
    return _draw([1, *tokens])


def _other_model(tokens: Sequence[int]) -> Logits:
    return _draw([2, *tokens])


def _tied_model(tokens: Sequence[int]) -> Logits:
    """Two leaders, closer than the tie margin."""
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
