"""Checks the numbers of a manifest before anything is allocated for them."""

import math
from collections.abc import Iterable, Iterator
from typing import NoReturn

from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import Graph, LayerCache, Manifest, TensorSpec

LARGEST = 2**31 - 1  # tokens, slots, heads, and elements of one tensor
VOCABULARY = 1 << 24  # Gemma's has 2^18
_ALL_STATES = 1 << 34  # elements: 64 GiB of float32
_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8")


def check_sizes(manifest: Manifest) -> None:
    """Raise BundleError for a size that no bundle has: negative, zero, or beyond all memory."""
    check_numbers(manifest, vocab_size=VOCABULARY, context_length=LARGEST, prefill_length=LARGEST)
    for index, layer in enumerate(manifest.layers):
        for problem in _layer_problems(index, layer, manifest.context_length):
            _refuse(f"layer {index}: {problem}")
    check_graphs(manifest.graphs.values())


def check_numbers(manifest: object, **limits: int) -> None:
    """Raise BundleError for a field that is not from 1 to its limit."""
    for name, limit in limits.items():
        if not 1 <= (found := getattr(manifest, name)) <= limit:
            _refuse(f"{name} is {found}, expected 1 to {limit}")


def check_graphs(graphs: Iterable[Iterable[Graph]]) -> None:
    """Raise BundleError for a tensor that no graph has. Each graph may have several parts."""
    for problem in _graph_problems(graphs):
        _refuse(problem)


def _refuse(problem: str) -> NoReturn:
    raise BundleError(f"manifest.json is not valid: {problem}; export again")


def _graph_problems(graphs: Iterable[Iterable[Graph]]) -> Iterator[str]:
    for parts in graphs:
        for part in parts:
            for tensor in (*part.inputs, *part.outputs, *part.states):
                yield from (f"{tensor.name!r:.60} {one}" for one in _tensor_problems(tensor))
            if sum(map(_elements, part.states)) > _ALL_STATES:
                yield f"the states of {part.file!r:.60} have more than {_ALL_STATES} elements"


def _layer_problems(index: int, layer: LayerCache, context_length: int) -> Iterator[str]:
    sizes = (layer.slots, layer.kv_heads, layer.head_dim, layer.window or 1)
    if min(sizes) < 1 or layer.window == 0 or math.prod(sizes[:3]) > LARGEST:
        yield f"its cache has the sizes {layer.shape}, and its window is {layer.window}"
    if layer.slots < min(layer.window or context_length, context_length):
        yield f"its cache has {layer.slots} slots, fewer than its window and the context"
    if layer.source is not None and not 0 <= layer.source < index:
        yield f"it reads the cache of layer {layer.source}, expected an earlier one"


def _tensor_problems(tensor: TensorSpec) -> Iterator[str]:
    if tensor.dtype not in _DTYPES:
        yield f"is {tensor.dtype!r:.30}, expected one of {', '.join(_DTYPES)}"
    if min(_sizes(tensor), default=1) < 1 or _elements(tensor) > LARGEST:
        yield f"has the shape {tensor.shape!r:.60}"


def _sizes(tensor: TensorSpec) -> list[int]:
    """The dimensions that don't vary."""
    return [size for size in tensor.shape if isinstance(size, int)]


def _elements(tensor: TensorSpec) -> int:
    return math.prod(_sizes(tensor))
