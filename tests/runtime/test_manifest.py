import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import (
    SCHEMA_VERSION,
    Agreement,
    AttentionKind,
    CalibratedOn,
    File,
    Graph,
    Headroom,
    Int8Caches,
    LayerCache,
    Manifest,
    Model,
    Quantization,
    Rope,
    SamplingDefaults,
    Target,
    TensorRole,
    TensorSpec,
)
from tests.runtime.manifests import make_cache, make_graph, make_manifest

_text = st.text(max_size=12)
_count = st.integers(0, 2**40)
_number = st.floats(allow_nan=False, allow_infinity=False)
_layers = st.builds(
    LayerCache,
    st.sampled_from(AttentionKind),
    st.none() | _count,
    _count,
    _count,
    _count,
    st.none() | _count,
)
_tensors = st.builds(
    TensorSpec,
    _text,
    _text,
    st.lists(_count | _text, max_size=4).map(tuple),
    st.sampled_from(TensorRole),
    st.none() | st.sampled_from(AttentionKind),
    st.none() | _count,
)
_many_tensors = st.lists(_tensors, max_size=2).map(tuple)
_graphs = st.builds(Graph, _text, _many_tensors, _many_tensors, _many_tensors)
_agreements = st.builds(Agreement, _count, _number, _count, _number, _number, _number, _number)
_manifests = st.builds(
    Manifest,
    schema_version=st.just(SCHEMA_VERSION),
    model=st.builds(Model, _text, _text, _count, st.none() | _text, _text),
    target=st.builds(Target, _text, _text, st.lists(_text, max_size=2).map(tuple), _text),
    quantization=st.builds(
        Quantization,
        _text,
        _number,
        _text,
        st.dictionaries(_text, _text, max_size=2),
        st.none() | st.from_type(CalibratedOn),
    ),
    vocab_size=_count,
    context_length=_count,
    prefill_length=_count,
    bos_token=_count,
    eos_token=st.none() | _count,
    stop_tokens=st.lists(_count, max_size=3).map(tuple),
    sampling=st.none() | st.builds(SamplingDefaults, _number, _count, _number, _number, _number),
    chat_template=st.none() | _text,
    layers=st.lists(_layers, max_size=3).map(tuple),
    cache_dtype=st.sampled_from(["float32", "float16"]),
    graphs=st.dictionaries(_text, st.tuples(_graphs) | st.tuples(_graphs, _graphs), max_size=2),
    headroom=st.builds(Headroom, _number, _number),
    quality=_agreements,
    files=st.dictionaries(_text, st.builds(File, _text, _count), max_size=2),
    roles=st.dictionaries(_text, _text, max_size=2),
    tools=st.dictionaries(_text, _text, max_size=2),
    ropes=st.fixed_dictionaries(
        {kind: st.builds(Rope, _number, _number, _number) for kind in AttentionKind}
    ),
)


@given(_manifests)
def test_every_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all values below `value`, as keys and indices."""
    paths = [path] if path else []
    if isinstance(value, dict):
        for name, part in value.items():
            paths += _paths(part, (*path, name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            paths += _paths(part, (*path, index))
    return paths


_FREE_KEYS = ("tensors", "graphs", "files", "roles", "tools")
_PATHS = _paths(json.loads(make_manifest(roles={"goldens": "goldens.json"}).to_json()))
# Bundles from before untied heads, Gemma 4 and int8 caches lack them.
_OPTIONAL = ("looked_up", "source", "rotated", "int8_caches")
_FIELDS = [
    path
    for path in _PATHS
    if isinstance(path[-1], str) and (len(path) < 2 or path[-2] not in _FREE_KEYS)
    if path[-1] not in _OPTIONAL
]


@pytest.mark.parametrize("path", _FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_field_is_refused(path: tuple[str | int, ...]) -> None:
    fields, parent = _parent_of(path)
    del parent[path[-1]]

    with pytest.raises(BundleError, match="manifest"):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("path", _PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_mistyped_value_is_refused(path: tuple[str | int, ...]) -> None:
    fields, parent = _parent_of(path)
    parent[path[-1]] = [[True]]  # not the type of any field

    with pytest.raises(BundleError, match="manifest"):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("schema", "advice"),
    [(SCHEMA_VERSION + 1, "update gemma-export"), (SCHEMA_VERSION - 1, "export the model again")],
)
def test_another_schema_is_refused_before_its_fields_are_read(schema: int, advice: str) -> None:
    with pytest.raises(BundleError, match=f"schema {schema}.*{advice}"):
        Manifest.from_json(json.dumps({"schema_version": schema, "shape": "other"}).encode())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"schema_version": "1"}', b"[" * 100_000],
    ids=["empty", "cut", "null", "list", "no-field", "no-utf8", "mistyped", "deep"],
)
def test_bytes_that_are_not_a_manifest_are_refused(text: bytes) -> None:
    with pytest.raises(BundleError, match="not a manifest"):
        Manifest.from_json(text)


@given(st.binary(max_size=64))
def test_any_bytes_raise_only_bundle_errors(text: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


def test_cache_bytes_sum_keys_and_values_of_one_kind() -> None:
    layers = [
        LayerCache(AttentionKind.LOCAL, 16, 24, 2, 8),
        LayerCache(AttentionKind.LOCAL, 16, 20, 2, 8),
        LayerCache(AttentionKind.GLOBAL, None, 128, 1, 4),
    ]
    manifest = make_manifest(layers=layers)

    assert manifest.cache_bytes(AttentionKind.LOCAL) == 2 * 2 * 8 * (24 + 20) * 4
    assert manifest.cache_bytes(AttentionKind.GLOBAL) == 2 * 128 * 4 * 4
    half = replace(manifest, cache_dtype="float16")
    assert half.cache_bytes(AttentionKind.GLOBAL) == 2 * 128 * 4 * 2


def test_an_unknown_cache_dtype_is_refused() -> None:
    text = make_manifest().to_json().replace(b'"float32",\n  "graphs"', b'"int3",\n  "graphs"')

    with pytest.raises(BundleError, match="'int3', expected float32 or float16 or int8"):
        Manifest.from_json(text)


def test_int8_caches_survive_json_and_count_a_byte_an_element() -> None:
    manifest = make_manifest()
    caches = Int8Caches("0" * 64, CalibratedOn("default", 4096, 0, "1" * 64), manifest.quality)
    int8 = replace(manifest, cache_dtype="int8", int8_caches=caches)

    assert Manifest.from_json(int8.to_json()) == int8
    for kind in AttentionKind:
        assert int8.cache_bytes(kind) * 4 == manifest.cache_bytes(kind)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_int8_caches_without_their_scales_are_refused_and_scales_without_them(dtype: str) -> None:
    manifest = make_manifest()
    caches = Int8Caches("0" * 64, CalibratedOn("default", 4096, 0, "1" * 64), manifest.quality)
    wrong = replace(manifest, cache_dtype=dtype, int8_caches=None if dtype == "int8" else caches)

    with pytest.raises(BundleError, match="belong together"):
        Manifest.from_json(wrong.to_json())


def test_caches_are_paired_by_role_and_layer_whatever_their_names() -> None:
    keys = [make_cache(name, layer) for layer, name in enumerate(("past", "b"))]
    values = [replace(key, name=f"v{key.layer}", role=TensorRole.VALUES) for key in keys]
    states = (*keys, *values)
    returned = tuple(replace(state, name=f"new {state.name}") for state in reversed(states))
    graph = replace(make_graph(64), states=states, outputs=returned)

    assert [(a.name, b.name) for a, b in graph.returned_caches()] == [
        ("past", "new past"),
        ("b", "new b"),
        ("v0", "new v0"),
        ("v1", "new v1"),
    ]


def test_a_cache_that_is_not_given_back_is_refused() -> None:
    graph = replace(make_graph(64), outputs=(make_cache("present_key_0", layer=1),))

    with pytest.raises(BundleError, match="past_key_0"):
        list(graph.returned_caches())


def test_a_tensor_is_found_by_its_role() -> None:
    graph = make_graph(64)

    assert graph.tensor(TensorRole.LOGITS) is graph.outputs[0]
    with pytest.raises(BundleError, match="role total"):
        graph.tensor(TensorRole.TOTAL)


def test_a_graph_in_several_parts_is_not_taken_for_a_whole_one() -> None:
    graph = make_graph(64)
    manifest = replace(make_manifest(), graphs={"whole": (graph,), "split": (graph, graph)})

    assert manifest.graph("whole") is graph
    for name, count in (("split", 2), ("decode", 0)):
        with pytest.raises(BundleError, match=f"{count} parts of graph {name}"):
            manifest.graph(name)


def test_a_graph_without_parts_is_refused() -> None:
    empty = replace(make_manifest(), graphs={"decode": ()})

    with pytest.raises(BundleError, match="graph decode is empty"):
        Manifest.from_json(empty.to_json())


def _parent_of(path: tuple[str | int, ...]) -> tuple[Any, Any]:
    """A manifest's JSON, and the object or list in it that contains the value at `path`."""
    fields = json.loads(make_manifest(roles={"goldens": "goldens.json"}).to_json())
    parent = fields
    for name in path[:-1]:
        parent = parent[name]
    return fields, parent
