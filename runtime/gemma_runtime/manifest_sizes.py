"""Checks the numbers of a manifest before anything is allocated for them."""

import math
from collections.abc import Iterator

from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import LayerCache, Manifest, TensorSpec

_LARGEST = 2**31 - 1  # tokens, slots, heads, and elements of one tensor
_VOCABULARY = 1 << 24  # Gemma's has 2^18
_ALL_STATES = 1 << 34  # elements: 64 GiB of float32
_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8")


def check_sizes(manifest: Manifest) -> None:
    """Raise BundleError for a size that no bundle has: negative, zero, or beyond all memory."""
    for problem in _problems(manifest):
        raise BundleError(f"manifest.json is not valid: {problem}; export again")


def _problems(manifest: Manifest) -> Iterator[str]:
    limits = {"vocab_size": _VOCABULARY, "context_length": _LARGEST, "prefill_length": _LARGEST}
    for name, limit in limits.items():
        if not 1 <= (found := getattr(manifest, name)) <= limit:
            yield f"{name} is {found}, expected 1 to {limit}"
    for index, layer in enumerate(manifest.layers):
        problems = _layer_problems(index, layer, manifest.context_length)
        yield from (f"layer {index}: {problem}" for problem in problems)
    for parts in manifest.graphs.values():
        for part in parts:
            for tensor in (*part.inputs, *part.outputs, *part.states):
                yield from (f"{tensor.name!r:.60} {one}" for one in _tensor_problems(tensor))
            if sum(map(_elements, part.states)) > _ALL_STATES:
                yield f"the states of {part.file!r:.60} have more than {_ALL_STATES} elements"


def _layer_problems(index: int, layer: LayerCache, context_length: int) -> Iterator[str]:
    sizes = (layer.slots, layer.kv_heads, layer.head_dim, layer.window or 1)
    if min(sizes) < 1 or layer.window == 0 or math.prod(sizes[:3]) > _LARGEST:
        yield f"its cache has the sizes {layer.shape}, and its window is {layer.window}"
    if layer.slots < min(layer.window or context_length, context_length):
        yield f"its cache has {layer.slots} slots, fewer than its window and the context"
    if layer.source is not None and not 0 <= layer.source < index:
        yield f"it reads the cache of layer {layer.source}, expected an earlier one"


def _tensor_problems(tensor: TensorSpec) -> Iterator[str]:
    if tensor.dtype not in _DTYPES:
        yield f"is {tensor.dtype!r:.30}, expected one of {', '.join(_DTYPES)}"
    if min(_sizes(tensor), default=1) < 1 or _elements(tensor) > _LARGEST:
        yield f"has the shape {tensor.shape!r:.60}"


def _sizes(tensor: TensorSpec) -> list[int]:
    """The dimensions that don't vary."""
    return [size for size in tensor.shape if isinstance(size, int)]


def _elements(tensor: TensorSpec) -> int:
    return math.prod(_sizes(tensor))
