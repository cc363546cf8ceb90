"""Merges LoRA adapters into a checkpoint while its rows are read, in float32.

Equal to PEFT's `merge_and_unload`. No weight is ever held whole. r rank, N outputs, K inputs,
V vocabulary, M width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, TokenizerFiles, check_finite, our_values
from gemma_export.checkpoint.adapter_fit import Change, fit_adapter, merged_config
from gemma_export.checkpoint.adapter_folder import ADAPTER_CONFIG, Adapter
from gemma_export.checkpoint.generation import GenerationDefaults
from gemma_export.checkpoint.prequantized import Prequantized, Stored
from gemma_export.checkpoint.tokenizer_folder import read_tokenizer
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import Codes
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import HEAD, TABLE, GemmaConfig
from gemma_runtime.bundle import sha256_file
from gemma_runtime.errors import CheckpointError


@dataclass(frozen=True)
class MergedCheckpoint:
    """A checkpoint with adapters merged into it, in the order in which they were given."""

    source: Checkpoint
    adapters: tuple[Adapter, ...]
    config: GemmaConfig
    notes: tuple[str, ...]
    _changes: Mapping[str, tuple["_Applied", ...]] = field(repr=False)

    @property
    def id(self) -> str:
        return "+".join((self.source.id, *(adapter.label for adapter in self.adapters)))

    @property
    def revision(self) -> str | None:
        return self.source.revision

    @property
    def generation(self) -> GenerationDefaults:
        return self.source.generation

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        changes = self._changes.get(name, ())
        base = merged = self._base(name, start, stop)
        for change in changes:
            merged = change.merge(merged, base, start, stop, self)
        return merged

    def stored(self, name: str) -> Stored:
        """The source's answer for weights that no adapter changes."""
        if name in self._changes:
            labels = ", ".join(adapter.label for adapter in self.adapters)
            return Stored(f"merged with {labels}")
        if isinstance(self.source, Prequantized):
            return self.source.stored(self._source_name(name))
        return Stored("float32")

    def codes(self, name: str, start: int, stop: int) -> Codes:
        assert name not in self._changes, name
        assert isinstance(self.source, Prequantized), name
        return self.source.codes(self._source_name(name), start, stop)

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [self.source.digest()]
        for adapter in self.adapters:
            files = (adapter.folder / ADAPTER_CONFIG, adapter.path)
            parts += [*map(sha256_file, files), repr(adapter.weight)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def tokenizer(self) -> TokenizerFiles | None:
        """The first adapter's that has one, because training may have added tokens."""
        own = (read_tokenizer(adapter.folder, self.config.vocab_size) for adapter in self.adapters)
        return next((files for files in own if files is not None), None) or self.source.tokenizer()

    def column_norms(self, change: "_Applied") -> Tensor:
        """Norm of every column of the table with this change alone: (M,)."""
        total: Tensor | None = None
        for span in row_blocks(self.config.tensor_shapes()[TABLE]):
            changed = self._base(TABLE, *span) + change.delta(*span)
            squares = changed.double().square().sum(0)
            total = squares if total is None else total + squares
        assert total is not None
        return total.sqrt().float()

    def _base(self, name: str, start: int, stop: int) -> Tensor:
        """The weight that adapters change: the last one that an adapter brought, or the source's.

        PEFT saves a copy of the embedding beside its LoRA matrices, and loads it.
        """
        for change in reversed(self._changes.get(name, ())):
            if change.what.whole is not None:
                return our_values(self.config, name, change.read(change.what.whole, start, stop))
        return self.source.rows(self._source_name(name), start, stop)

    def _source_name(self, name: str) -> str:
        """The source's name of a weight: a new head starts as the table."""
        return self.source.config.head if name == HEAD else name


@dataclass(frozen=True)
class _Applied:
    """One adapter's change of one weight."""

    what: Change
    file: SafetensorsFile
    _norms: list[Tensor] = field(default_factory=list)  # the table's column norms, once computed
    _lock: Lock = field(default_factory=Lock)

    def merge(
        self, merged: Tensor, base: Tensor, start: int, stop: int, checkpoint: MergedCheckpoint
    ) -> Tensor:
        """Add the change to `merged`; `base` has none of the adapters."""
        if self.what.some is not None:
            return self._with_tokens(merged, start, stop, self.what.some)
        if self.what.is_replacement:
            return merged
        delta = self.delta(start, stop)
        merged = merged + delta
        if self.what.magnitude is None:
            return merged
        if self.what.is_embedding:
            return merged * (self._magnitude() / self._column_norms(checkpoint))
        norms: Tensor = torch.linalg.vector_norm(base + delta, dim=1)
        return merged * (self._magnitude()[start:stop] / norms)[:, None]

    def delta(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of scale · B @ A."""
        down, up = self.what.down, self.what.up
        assert down is not None
        assert up is not None
        rank = self.file.tensors[down].shape[0]
        if self.what.is_embedding:
            ranks = self.file.columns(down, start, stop).float()  # (r, n)
            check_finite(self.file.path, down, ranks)
            width = self.file.tensors[up].shape[0]
            return (ranks.T @ self.read(up, 0, width).T).mul_(self.what.scale)  # (n, M)
        return (self.read(up, start, stop) @ self.read(down, 0, rank)).mul_(self.what.scale)

    def read(self, stored: str, start: int, stop: int) -> Tensor:
        values = self.file.rows(stored, start, stop).float()
        check_finite(self.file.path, stored, values)
        return values

    def _with_tokens(self, rows: Tensor, start: int, stop: int, stored: str) -> Tensor:
        """The rows with those of trained tokens replaced."""
        here = [(i, token) for i, token in enumerate(self.what.tokens) if start <= token < stop]
        rows = rows.clone() if here else rows
        for index, token in here:
            rows[token - start] = self.read(stored, index, index + 1)[0]
        return rows

    def _magnitude(self) -> Tensor:
        assert self.what.magnitude is not None
        return self.read(self.what.magnitude, 0, *self.file.tensors[self.what.magnitude].shape)

    def _column_norms(self, checkpoint: MergedCheckpoint) -> Tensor:
        with self._lock:
            if not self._norms:
                self._norms.append(checkpoint.column_norms(self))
            return self._norms[0]


def merge_adapters(source: Checkpoint, adapters: Sequence[Adapter]) -> MergedCheckpoint:
    """The checkpoint with adapters. Raises CheckpointError for one that doesn't fit it."""
    changes: dict[str, tuple[_Applied, ...]] = {}
    owners: dict[str, Adapter] = {}
    notes = list(source.notes)
    fitted = [(adapter, *fit_adapter(adapter, source.config)) for adapter in adapters]
    if source.config.tied:
        _check_ties([(adapter, found) for adapter, found, _ in fitted])
    for adapter, found, own_notes in fitted:
        notes += own_notes
        notes += _other_base(source, adapter)
        file = SafetensorsFile(adapter.path)
        for name, whats in found.items():
            applied = tuple(_Applied(what, file) for what in whats)
            earlier = changes.get(name, ())
            if earlier and any(one.what.is_replacement for one in (*earlier, *applied)):
                raise CheckpointError(
                    f"adapters {owners[name].name} and {adapter.name} both change {name}, and one "
                    "of them replaces its values; leave one of them out"
                )
            changes[name], owners[name] = earlier + applied, adapter
    config = merged_config(source.config, changes)
    return MergedCheckpoint(source, tuple(adapters), config, tuple(notes), changes)


def _check_ties(changes: Sequence[tuple[Adapter, Mapping[str, object]]]) -> None:
    """Raise CheckpointError if one adapter unties the head, and another changes the table alone."""
    untying = next((adapter for adapter, found in changes if HEAD in found), None)
    for adapter, found in changes:
        if untying is not None and TABLE in found and HEAD not in found:
            raise CheckpointError(
                f"adapter {untying.name} gives the model a head of its own, and adapter "
                f"{adapter.name} was made for one tensor as table and head; leave one of them out"
            )


def _other_base(source: Checkpoint, adapter: Adapter) -> list[str]:
    """A note if the adapter's config names a model of another name."""
    if adapter.base is None:
        return []
    named, given = (text.replace("\\", "/").rstrip("/").split("/")[-1] for text in
                    (adapter.base, source.id))  # fmt: skip
    if named.lower() == given.lower() or source.id.startswith("random:"):
        return []
    return [f"adapter {adapter.name} was trained on {adapter.base}; it is merged into {source.id}"]
