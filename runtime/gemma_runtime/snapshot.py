"""Snapshots: what a session's caches hold, to go on from there in another session.

Slots are the second last dimension of every cache: (…, S, D), maybe with rows after the last slot
for padding. R rows are in use.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError
from gemma_runtime.manifest import AttentionKind, LayerCache, TensorSpec

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tokens of a session, and its caches as far as they are in use."""

    tokens: tuple[int, ...]
    written: int  # most tokens that were in the caches since they were empty
    graph: str  # file of the graph whose caches these are, and what runs it
    caches: Mapping[str, Array]  # by the cache's name, (…, R, D); may be read when asked for


class Caches(Protocol):
    """The KV caches of a loaded program, by name."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, rows: int | None = None) -> Array:
        """A copy of the first rows; of all if `rows` is None."""
        ...

    def write(self, name: str, value: Array) -> None:
        """Replace the first rows: as many as `value` has."""
        ...


class WholeCaches(ABC):
    """Base of caches that a program gives and takes only whole."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs

    @abstractmethod
    def _get(self, name: str) -> Array:
        """What a cache holds; it is copied before it is changed."""

    @abstractmethod
    def _put(self, name: str, whole: Array) -> None: ...

    def read(self, name: str, rows: int | None = None) -> Array:
        return self._get(name)[..., :rows, :].copy()

    def write(self, name: str, value: Array) -> None:
        whole = self.read(name)
        whole[..., : value.shape[-2], :] = value
        self._put(name, whole)


def copy_local(caches: Caches) -> Callable[[], None]:
    """Copy the local layers' caches; returns what puts the copy back."""
    local = [name for name, spec in caches.specs.items() if spec.kind is AttentionKind.LOCAL]
    held = {name: caches.read(name) for name in local}

    def restore() -> None:
        for name, value in held.items():
            caches.write(name, value)

    return restore


def copy_rows(caches: Caches, layers: Sequence[LayerCache], written: int) -> dict[str, Array]:
    """Copy the rows of all caches that are in use after `written` tokens."""
    return {
        name: caches.read(name, _rows(spec, layers, written)) for name, spec in caches.specs.items()
    }


def put_rows(caches: Caches, layers: Sequence[LayerCache], snapshot: Snapshot) -> None:
    """Put back what `copy_rows` copied. Raises SessionError if the caches are others."""
    held = snapshot.caches
    if held.keys() != caches.specs.keys():
        raise SessionError(
            f"the snapshot has {len(held)} caches, this session has {len(caches.specs)}, or their "
            "names differ; save it again"
        )
    for name, spec in caches.specs.items():
        value = held[name]
        *outer, _, width = spec.shape
        shape = (*outer, _rows(spec, layers, snapshot.written), width)
        if (value.dtype.name, value.shape) != (spec.dtype, shape):
            raise SessionError(
                f"the snapshot's {name} is {value.dtype.name} {list(value.shape)}, expected "
                f"{spec.dtype} {list(shape)}; save it again"
            )
        caches.write(name, value)


def _rows(spec: TensorSpec, layers: Sequence[LayerCache], written: int) -> int:
    """Slots fill in order, so these are the first ones, or all of them."""
    return min(written, next(layer.slots for layer in layers if layer.kind is spec.kind))
