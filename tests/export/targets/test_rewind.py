"""Sessions of tiny models go back exactly, on every target that runs here."""

from dataclasses import replace

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
PAST_THREE_WINDOWS = range(1, 3 * WINDOW + 4)
AROUND_WINDOWS = (1, 4, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 3 * WINDOW + 2)
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


@pytest.fixture(scope="module")
def int8_bundle(short_gemma3: TinyCheckpoint, export: Export) -> Bundle:
    return export(short_gemma3.folder, "int8", context=CONTEXT)


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS)
def test_onnx_is_exact_after_any_operations(
    onnx_bundle: Bundle, full_cache: Bundle, int8_bundle: Bundle, operations: list[Operation]
) -> None:
    for bundle in (onnx_bundle, full_cache, int8_bundle):
        with open_session(bundle, threads=1) as one, open_session(bundle, threads=1) as fresh:
            check_operations(one, fresh, operations)


def test_onnx_would_be_wrong_far_before_the_last_shortening(
    onnx_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wrong(onnx_bundle, SLOTS, STEP, monkeypatch)


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


@pytest.fixture(scope="module")
def executorch_bundle(short_gemma3: TinyCheckpoint, export: Export) -> Bundle:
    pytest.importorskip("executorch")
    return export(short_gemma3.folder, "none", target="executorch")


@pytest.fixture(scope="module", params=["coreml", "coreai"])
def apple_bundle(
    request: pytest.FixtureRequest, short_gemma2: TinyCheckpoint, export: Export
) -> Bundle:
    """Of two layers, since a step takes tens of milliseconds."""
    pytest.importorskip({"coreml": "coremltools", "coreai": "coreai_torch"}[request.param])
    return export(short_gemma2.folder, "none", target=request.param, prefill=8)


@pytest.mark.parametrize("back", [1, 24, 25])
def test_executorch_goes_back_by_its_prefill_length(executorch_bundle: Bundle, back: int) -> None:
    slots = WINDOW + 24 - 1
    expected = [p if back <= 24 or p + back <= slots else 0 for p in PAST_THREE_WINDOWS]
    with open_session(executorch_bundle, threads=1) as session:
        assert check_rewinds(session, TOKENS, PAST_THREE_WINDOWS, back, mark=False) == expected


@pytest.mark.parametrize("back", [24, 25, 60])
def test_executorch_goes_back_to_a_mark_from_anywhere(executorch_bundle: Bundle, back: int) -> None:
    """Its caches are inside the program, where a mark couldn't reach them."""
    with open_session(executorch_bundle, threads=1) as session:
        answers = check_rewinds(session, TOKENS, AROUND_WINDOWS, back, mark=True)
    assert answers == [*AROUND_WINDOWS]


def test_programs_that_do_not_name_their_caches_go_back_as_before(
    executorch_bundle: Bundle,
) -> None:
    """Bundles of earlier versions, and programs of other delegates."""
    graphs = {
        name: tuple(replace(part, states=()) for part in parts)
        for name, parts in executorch_bundle.manifest.graphs.items()
    }
    manifest = replace(executorch_bundle.manifest, graphs=graphs)
    with open_session(replace(executorch_bundle, manifest=manifest), threads=1) as session:
        assert check_rewinds(session, TOKENS, [40], 25, mark=True) == [0]
        with pytest.raises(SessionError, match="keeps its caches to itself"):
            session.save()


@settings(max_examples=10, deadline=None)
@given(operations=OPERATIONS)
def test_executorch_is_exact_after_any_operations(
    executorch_bundle: Bundle, operations: list[Operation]
) -> None:
    with (
        open_session(executorch_bundle, threads=1) as one,
        open_session(executorch_bundle, threads=1) as fresh,
    ):
        check_operations(one, fresh, operations)


@pytest.mark.parametrize("back", [1, 2, 12])
def test_rings_of_one_window_go_back_by_one_token(apple_bundle: Bundle, back: int) -> None:
    expected = [p if back == 1 or p + back <= WINDOW else 0 for p in AROUND_WINDOWS]
    with open_session(apple_bundle) as session:
        assert check_rewinds(session, TOKENS, AROUND_WINDOWS, back, mark=False) == expected


def test_rings_of_one_window_go_back_to_a_mark_from_anywhere(apple_bundle: Bundle) -> None:
    with open_session(apple_bundle) as session:
        answers = check_rewinds(session, TOKENS, AROUND_WINDOWS, back=20, mark=True)
    assert answers == [*AROUND_WINDOWS]


def test_rings_of_one_window_are_exact_after_many_operations(apple_bundle: Bundle) -> None:
    operations = [
        *[("feed", 13), ("hold", 0), ("feed", 30), ("return", 0), ("feed", 1), ("rewind", 1)],
        *[("feed", 9), ("hold", 0), ("feed", 20), ("return", 1), ("return", 0), ("feed", 5)],
        *[("drop", 0), ("feed", 17), ("rewind", 3), ("reset", 0), ("return", 0)],
    ]
    with open_session(apple_bundle) as one, open_session(apple_bundle) as fresh:
        check_operations(one, fresh, operations)


def test_executorch_would_be_wrong_one_token_further_back(
    executorch_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wrong(executorch_bundle, 3 * WINDOW, 25, monkeypatch)


def test_rings_of_one_window_would_be_wrong_one_token_further_back(
    apple_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wrong(apple_bundle, 3 * WINDOW, 2, monkeypatch)


def check_wrong(bundle: Bundle, position: int, back: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule the logits are wrong: the other tests can fail."""
    with open_session(bundle, threads=1) as session:
        monkeypatch.setattr(session, "_holds", lambda position, written: True)
        with pytest.raises(AssertionError):
            check_rewinds(session, TOKENS, [position], back, mark=False)
