"""What a static chunk is given beside its tokens: positions, slots, masks, as an app brings them.

T tokens of a chunk, S slots, N new tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.manifest import AttentionKind, LayerCache, Manifest

# Far below any score, and within float16: -inf is not for every one of Apple's units.
_HIDDEN = -4e4

Feeds = dict[str, NDArray[np.generic]]


def make_feeds(manifest: Manifest, tokens: Sequence[int], position: int) -> tuple[str, Feeds]:
    """The function that takes N tokens at a position, and its inputs in the manifest's order."""
    function = "decode" if len(tokens) == 1 else "prefill"
    length = manifest.prefill_length if function == "prefill" else 1
    made: Feeds = {
        "tokens": _padded(tokens, length),
        "positions": _padded(range(position, position + len(tokens)), length),
        "last": np.array([len(tokens) - 1], np.int32),
    }
    for kind in AttentionKind:
        cache = next((c for c in manifest.layers if c.kind is kind), None)
        if cache is not None:
            made[f"{kind.value}_slots"] = _slots(position, len(tokens), length, cache)
            made[f"{kind.value}_mask"] = _mask(manifest, position, len(tokens), length, cache)
    return function, {spec.name: made[spec.name] for spec in manifest.graphs[function].inputs}


def _mask(
    manifest: Manifest, position: int, count: int, length: int, cache: LayerCache
) -> NDArray[np.float16]:
    """What each token of the chunk sees: (T, S + …)."""
    query = position + np.arange(length)[:, None]  # (T, 1)
    if cache.kind is AttentionKind.LOCAL:
        held = position - 1 - np.mod(position - 1 - np.arange(cache.slots), cache.slots)
        chunk = np.where(np.arange(length) < count, position + np.arange(length), -1)
        held = np.concatenate([held, chunk])
    else:
        rows = _rows(manifest, cache)
        held = np.where(np.arange(rows) < position + count, np.arange(rows), -1)
    seen = (held >= 0) & (held <= query)
    if cache.window is not None:
        seen &= held > query - cache.window
    return np.where(seen, 0.0, _HIDDEN).astype(np.float16)


def _slots(position: int, count: int, length: int, cache: LayerCache) -> NDArray[np.int32]:
    """Where each token is written; padding goes to the row behind the slots."""
    places = (position + np.arange(length)) % cache.slots
    return np.where(np.arange(length) < count, places, cache.slots).astype(np.int32)


def _rows(manifest: Manifest, cache: LayerCache) -> int:
    """Slots and the trash behind them, as the state was laid out."""
    name = f"{cache.kind.value}_cache"
    shapes = {state.name: state.shape for state in manifest.graphs["decode"].states}
    return int(shapes[name][1])


def _padded(values: Sequence[int], length: int) -> NDArray[np.int32]:
    return np.pad(np.array(values, np.int32), (0, length - len(values)))
