"""Sessions of tiny models go back exactly, on every target that runs here."""

import numpy as np
import pytest
from hypothesis import given, settings

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint
from tests.export.models import WINDOW
from tests.export.rewinding import (
    OPERATIONS,
    Operation,
    check_operations,
    check_rewinds,
)

CONTEXT = 224
TOKENS = np.random.default_rng(2).integers(0, 96, CONTEXT).tolist()
PAST_THREE_WINDOWS = range(3 * WINDOW + 2)
SLOTS, STEP = WINDOW + 64, 65  # of ONNX bundles: a full cache drops STEP tokens


@pytest.fixture(scope="module")
def onnx_bundle(short_gemma3: TinyCheckpoint, export: Export) -> Bundle:
    return export(short_gemma3.folder, "none", context=CONTEXT)


@pytest.fixture(scope="module")
def full_cache(short_gemma3: TinyCheckpoint, export: Export) -> Bundle:
    return export(short_gemma3.folder, "none", context=CONTEXT, full_cache=True)


@pytest.mark.parametrize("back", [1, 5, 30, 64])
def test_onnx_goes_back_to_where_its_caches_were_not_shortened_since(
    onnx_bundle: Bundle, back: int
) -> None:
    positions = range(1, CONTEXT - max(back, 4) + 1)
    with open_session(onnx_bundle, threads=1) as session:
        answers = check_rewinds(session, TOKENS, positions, back, mark=False)
    shortened = [SLOTS + i * STEP for i in range(9)]  # the totals that are the last to fit
    expected = [0 if any(p <= s < p + back for s in shortened) else p for p in positions]
    assert answers == expected


@pytest.mark.parametrize("back", [1, 64, 100])
def test_onnx_goes_back_to_a_mark_from_anywhere(onnx_bundle: Bundle, back: int) -> None:
    positions = range(1, CONTEXT - max(back, 4) + 1, 3)
    with open_session(onnx_bundle, threads=1) as session:
        assert check_rewinds(session, TOKENS, positions, back, mark=True) == [*positions]


@pytest.mark.parametrize("back", [1, 30, 100])
def test_a_full_cache_goes_back_anywhere(full_cache: Bundle, back: int) -> None:
    positions = range(1, CONTEXT - max(back, 4) + 1, 3)
    with open_session(full_cache, threads=1) as session:
        assert check_rewinds(session, TOKENS, positions, back, mark=False) == [*positions]


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS)
def test_onnx_is_exact_after_any_operations(
    onnx_bundle: Bundle, full_cache: Bundle, operations: list[Operation]
) -> None:
    for bundle in (onnx_bundle, full_cache):
        with open_session(bundle, threads=1) as one, open_session(bundle, threads=1) as fresh:
            check_operations(one, fresh, operations)


def test_going_back_further_than_the_caches_hold_would_be_wrong(
    onnx_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the tests above can fail."""
    with open_session(onnx_bundle, threads=1) as session:
        monkeypatch.setattr(session, "_holds", lambda position, written: True)
        with pytest.raises(AssertionError):
            check_rewinds(session, TOKENS, [SLOTS], back=STEP, mark=False)


def test_positions_and_marks_that_a_session_never_had_are_refused(onnx_bundle: Bundle) -> None:
    with open_session(onnx_bundle, threads=1) as one, open_session(onnx_bundle, threads=1) as other:
        one.prefill(TOKENS[:5])
        for position in (-1, 6):
            with pytest.raises(
                SessionError, match=rf"position {position}: 5 tokens .* give 0 to 5"
            ):
                one.rewind(position)
        with pytest.raises(SessionError, match="mark is of another session"):
            one.rewind(other.hold())
        assert one.position == 5
