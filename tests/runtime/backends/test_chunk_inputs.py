"""Inputs are filled by what the manifest says of them, not by their names."""

from dataclasses import replace

import numpy as np
import pytest

from gemma_runtime.backends.chunk_inputs import ChunkInputs
from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import AttentionKind, Graph, TensorRole, TensorSpec
from tests.runtime.manifests import make_graph, make_layers, make_manifest


def _graph(*inputs: TensorSpec) -> Graph:
    return replace(make_graph(64), inputs=inputs)


def _spec(role: TensorRole, kind: AttentionKind | None, *shape: int) -> TensorSpec:
    return TensorSpec(f"any {role} {kind}", "float32", shape, role, kind, None)


def test_inputs_are_filled_by_role_and_kind_whatever_their_names() -> None:
    chunk = ChunkInputs(make_manifest(), {}, [7, 8, 9], 30)
    specs = [
        _spec(TensorRole.TOKENS, None, 4),
        _spec(TensorRole.LAST, None, 1),
        _spec(TensorRole.SLOTS, AttentionKind.LOCAL, 4),
        _spec(TensorRole.SLOTS, AttentionKind.GLOBAL, 4),
        _spec(TensorRole.HIDDEN, None, 4, 8),
    ]

    found = chunk.of(_graph(*specs))

    assert {name: value.tolist() for name, value in found.items()} == {
        "any tokens None": [7, 8, 9, 0],
        "any last None": [2],
        "any slots local": [6, 7, 8, 24],  # a ring of 24; padding goes behind it
        "any slots global": [30, 31, 32, 128],
    }
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("position", "count"), [(0, 5), (3, 8), (23, 8), (24, 1), (61, 6)])
@pytest.mark.parametrize("kind", AttentionKind)
def test_a_token_sees_itself_and_what_came_before_within_its_window(
    kind: AttentionKind, position: int, count: int
) -> None:
    """By definition, on a cache that notes which position was written last into each slot."""
    cache = next(layer for layer in make_layers() if layer.kind is kind)
    slots = {place % cache.slots: place for place in range(position)}
    chunk = list(range(position, position + count))
    if kind is AttentionKind.LOCAL:  # the old ring, and behind it the chunk with its padding
        columns: list[int | None] = [*map(slots.get, range(cache.slots)), *chunk]
        columns += [None] * (8 - count)
    else:  # the cache with the chunk already written
        columns = list(map({**slots, **dict(zip(chunk, chunk, strict=True))}.get, range(128)))

    spec = _spec(TensorRole.MASK, kind, 8, len(columns))
    (mask,) = ChunkInputs(make_manifest(), {}, [7] * count, position).of(_graph(spec)).values()

    window = cache.window or cache.slots
    for row, query in enumerate(chunk):
        seen = [key is not None and query - window < key <= query for key in columns]
        assert (mask[row] == 0).tolist() == seen


@pytest.mark.parametrize("kind", AttentionKind)
def test_cosines_and_sines_are_those_of_their_kind_of_layers(kind: AttentionKind) -> None:
    manifest = make_manifest()
    specs = (_spec(TensorRole.COS, kind, 1, 4), _spec(TensorRole.SIN, kind, 1, 4))

    cos, sin = ChunkInputs(manifest, {}, [1], 3).of(_graph(*specs)).values()

    angle = 3 * manifest.ropes[kind].base ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(np.arctan2(sin[0], cos[0]), np.angle(np.exp(1j * angle)), atol=2e-3)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (_spec(TensorRole.MASK, None, 4, 8), "no layer uses input"),
        (_spec(TensorRole.MASK, AttentionKind.GLOBAL, 4, 8), "no layer uses input"),
        (_spec(TensorRole.START, AttentionKind.LOCAL, 1), "role start"),
    ],
)
def test_an_input_that_nothing_fills_is_one_line(spec: TensorSpec, match: str) -> None:
    manifest = replace(make_manifest(), layers=tuple(make_layers()[:2]))

    with pytest.raises(BundleError, match=match):
        ChunkInputs(manifest, {}, [1], 0).of(_graph(spec))
