"""Sessions of tiny models go on from a snapshot exactly, on every target that runs here."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.session import Session, open_session
from gemma_runtime.snapshot import Snapshot
from tests.export.conftest import Export, TinyCheckpoint
from tests.export.models import E2B, WINDOW, save_tiny
from tests.export.rewinding import check_resumes, check_resumes_from_file, cut

TOKENS = np.random.default_rng(4).integers(0, 96, 224).tolist()
AROUND_WINDOWS = (1, WINDOW - 1, WINDOW, 2 * WINDOW + 3)
# Caches of ONNX bundles have WINDOW + 64 slots, and are shortened when they are full.
AROUND_SLOTS = (*AROUND_WINDOWS, WINDOW + 64, WINDOW + 65, 150)
Two = tuple[Session, Session]


_LAYOUTS: dict[str, dict[str, object]] = {
    "none": {"quant": "none"},
    "int8": {"quant": "int8"},
    "full cache": {"quant": "none", "full_cache": True},
    "int8 cache": {"quant": "int8", "cache": "int8"},
}


@pytest.fixture(scope="module", params=[*_LAYOUTS, "shared caches"])
def onnx(
    request: pytest.FixtureRequest,
    short_gemma3: TinyCheckpoint,
    export: Export,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Two]:
    folder, layout = short_gemma3.folder, _LAYOUTS.get(request.param, {"quant": "none"})
    if request.param == "shared caches":
        folder = tmp_path_factory.mktemp("e2b")
        save_tiny(E2B, folder)
    yield from two_sessions(export(folder, context=224, **layout))


@pytest.fixture(scope="module")
def executorch(short_gemma3: TinyCheckpoint, export: Export) -> Iterator[Two]:
    pytest.importorskip("executorch")
    yield from two_sessions(export(short_gemma3.folder, "none", target="executorch"))


@pytest.fixture(scope="module", params=["coreml", "coreai"])
def apple(
    request: pytest.FixtureRequest, short_gemma2: TinyCheckpoint, export: Export
) -> Iterator[Two]:
    pytest.importorskip({"coreml": "coremltools", "coreai": "coreai_torch"}[request.param])
    bundle = export(short_gemma2.folder, "none", target=request.param, prefill=8)
    yield from two_sessions(bundle)


def two_sessions(bundle: Bundle) -> Iterator[Two]:
    with ExitStack() as opened:
        one, other = (opened.enter_context(open_session(bundle, threads=1)) for _ in range(2))
        yield one, other


@pytest.mark.parametrize("length", AROUND_SLOTS)
@pytest.mark.parametrize("chunk", [1, 7, WINDOW, 224])
def test_onnx_goes_on_from_a_snapshot(onnx: Two, length: int, chunk: int) -> None:
    check_resumes(*onnx, cut(TOKENS[:length], chunk))


@pytest.mark.parametrize("length", AROUND_WINDOWS)
@pytest.mark.parametrize("chunk", [1, 7, 224])
def test_executorch_goes_on_from_a_snapshot(executorch: Two, length: int, chunk: int) -> None:
    check_resumes(*executorch, cut(TOKENS[:length], chunk))


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (WINDOW - 1, 1), (WINDOW, 7), (35, 224), (35, 3)]
)
def test_apple_s_graphs_go_on_from_a_snapshot(apple: Two, length: int, chunk: int) -> None:
    check_resumes(*apple, cut(TOKENS[:length], chunk))


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml", "coreai"])
def test_a_snapshot_goes_through_a_file(
    short_gemma2: TinyCheckpoint, export: Export, tmp_path: Path, target: str
) -> None:
    pytest.importorskip({"coreml": "coremltools", "coreai": "coreai_torch"}.get(target, target))
    bundle = export(short_gemma2.folder, "none", target=target, prefill=8)
    for sessions in two_sessions(bundle):
        check_resumes_from_file(*sessions, bundle, tmp_path / "file.safetensors")


def test_a_snapshot_after_going_back_goes_back_as_far(onnx: Two) -> None:
    """What later tokens pushed out of the caches is not there, whoever holds them."""
    session, other = onnx
    session.reset()
    session.prefill(TOKENS[:100])
    session.rewind(98)
    other.resume(session.save())
    assert [other.rewind(at) for at in (97, 90)] == [session.rewind(at) for at in (97, 90)]
    assert np.array_equal(other.decode(3), session.decode(3))


def test_a_snapshot_holds_only_rows_in_use(onnx: Two) -> None:
    session, _ = onnx
    session.reset()
    session.prefill(TOKENS[:10])
    assert {array.shape[-2] for array in session.save().caches.values()} == {10}
    session.prefill(TOKENS[:140])
    rows = {array.shape[-2] for array in session.save().caches.values()}
    assert max(rows) == 150
    assert min(rows) in (WINDOW + 64, 150)  # the window's slots, or a full cache


def test_an_empty_session_has_nothing_to_save(onnx: Two) -> None:
    session, _ = onnx
    session.reset()
    with pytest.raises(SessionError, match="no tokens given"):
        session.save()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "exact.onnx"}, "snapshot is of exact.onnx, this session runs model.onnx"),
        ({"tokens": (5, 96)}, "token 96 is outside the vocabulary"),
        ({"tokens": ()}, "no tokens"),
        ({"written": 1}, "2 tokens after 1, which no session"),
        ({"written": 225}, "2 tokens after 225, which no session"),
        ({"caches": {}}, "has 0 caches, this session has [68]"),
        ({"written": 3}, r"past_key_0 is \w+ \[1, 1, 2, (\d+)\], expected \w+ \[1, 1, 3, \1\]"),
    ],
)
def test_a_snapshot_that_can_not_be_of_this_session_is_refused(
    onnx: Two, change: dict[str, object], message: str
) -> None:
    session, other = onnx
    session.reset()
    session.prefill([5, 7])
    snapshot: Snapshot = replace(session.save(), **change)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match=message):
        other.resume(snapshot)
    assert other.position == 0


def test_a_cache_of_another_type_is_refused(onnx: Two) -> None:
    session, other = onnx
    session.reset()
    session.prefill([5, 7])
    snapshot = session.save()
    caches = {name: array.astype(np.float64) for name, array in snapshot.caches.items()}
    with pytest.raises(SessionError, match="is float64"):
        other.resume(replace(snapshot, caches=caches))
    assert other.position == 0


def test_a_snapshot_of_the_float_graph_is_refused_by_the_other(
    short_gemma3: TinyCheckpoint, export: Export
) -> None:
    bundle = export(short_gemma3.folder, "int8", context=224)
    with open_session(bundle, threads=1) as one, open_session(bundle, 1, exact=True) as exact:
        exact.prefill([5, 7])
        with pytest.raises(SessionError, match=r"is of exact\.onnx, this session runs model\.onnx"):
            one.resume(exact.save())


def test_without_the_caches_the_logits_are_others(onnx: Two) -> None:
    """Shows that the tests above can fail."""
    session, other = onnx
    session.reset()
    session.prefill(TOKENS[:20])
    snapshot = session.save()
    name = max(snapshot.caches)
    zeros = {**snapshot.caches, name: np.zeros_like(snapshot.caches[name])}
    other.resume(replace(snapshot, caches=zeros))
    assert not np.array_equal(other.decode(3), session.decode(3))
