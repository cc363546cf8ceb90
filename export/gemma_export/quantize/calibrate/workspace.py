"""The files of one calibration: what each holds, who writes it, who reads it.

A folder in the cache, named by model, rules and text. Every file appears whole or not at all, so
interrupted work goes on after the last one. `calibrated.STAGES` lists the work in order.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from gemma_export.cache_lock import exclusive
from gemma_export.checkpoint import Checkpoint
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import TABLE
from gemma_export.quantize.calibrate.arrange import ArrangedCheckpoint, read_arrangement
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.recipe import Recipe
from gemma_export.quantize.store import StoredWeight
from gemma_runtime.cache import ABOUT, About, cache_folder

_VERSION = "8"  # of calibration and its files: raise it when codes or files change


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """A file for each layer, or for each border between layers, by index."""

    folder: Path
    name: str
    count: int

    def __getitem__(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:02d}.safetensors"

    def __iter__(self) -> Iterator[Path]:
        return (self[index] for index in range(self.count))

    @property
    def last(self) -> Path:
        return self[self.count - 1]

    def lowest(self) -> int | None:
        """The lowest index whose file exists."""
        return next((i for i in range(self.count) if self[i].exists()), None)

    def highest(self) -> int | None:
        """The highest index whose file exists."""
        return next((i for i in reversed(range(self.count)) if self[i].exists()), None)

    def delete(self) -> None:
        for path in self:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Workspace:
    """A model, a recipe and a text, and the folder where one is rounded for the other."""

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: Calibration

    # Files, in the order in which they appear.

    @property
    def float_residuals(self) -> LayerFiles:
        """What the float model's layers get and give, for the first sequences.

        Written by `start_way_back`, read by `pass_back` and `measure_losses`, deleted by
        `end_way_back`.
        """
        return self._borders("float-residual")

    @property
    def errors(self) -> LayerFiles:
        """Gradients by those residuals, and what the table needs of the labels.

        Written by `start_way_back` for the last layer's, then by `leave_errors` for one layer after
        another, which deletes the one before. Read by `pass_back` and `table_information`.
        """
        return self._borders("errors")

    @property
    def losses(self) -> LayerFiles:
        """What each matrix costs when rounded: written and read by `measure_losses` (--bits)."""
        return self._layers("loss")

    @property
    def table_losses(self) -> Path:
        """The same for the table; its presence says that measuring is done."""
        return self._file("loss-table")

    @property
    def channel_order(self) -> Path:
        """An order of channels, factors of columns, and the curvature of the table in that order.

        Written by `weigh_table`, read by `arranged` and `calibrate_table`.
        """
        return self._file("channel-order")

    @property
    def teacher_residuals(self) -> LayerFiles:
        """The float model's residuals for all sequences; only the newest is kept.

        Written by `pass_teacher`, the last one read by `distill`, then deleted.
        """
        return self._borders("teacher-residual")

    @property
    def rounded_table(self) -> Path:
        """The table's codes: written by `calibrate_table`, read through `table` and by the store.

        Distillation leaves them as they are.
        """
        return self._file("rounded-table")

    @property
    def residuals(self) -> LayerFiles:
        """What the rounded layers give so far; only the newest is kept. `calibrate`'s own."""
        return self._borders("residual")

    @property
    def rounded_layers(self) -> LayerFiles:
        """Codes and balanced gains of a layer.

        Written by `calibrate`; read by it for the next layer, by `Student`, and by the store.
        """
        return self._layers("rounded")

    @property
    def learning(self) -> Path:
        """A folder with all that `Student` learns, changed in place and deleted at the end."""
        return self.folder / "learning"

    def saved(self) -> list[Path]:
        """Copies of `learning` after some step, which interrupted distillation starts from."""
        return sorted(self.folder.glob("saved-*"))

    def saved_at(self, step: int) -> Path:
        """Written and read by `Student`; the name holds the number of steps done."""
        return self.folder / f"saved-{step:06d}"

    @property
    def distilled_layers(self) -> LayerFiles:
        """Like `rounded_layers`, as learned: written by `Student.write`, read by the store."""
        return self._layers("distilled")

    @property
    def distilled_gain(self) -> Path:
        """The final gain as learned; its presence says that distillation is done."""
        return self._file("distilled-gain")

    # What the work is about.

    @property
    def key(self) -> str:
        parts = (_VERSION, self.checkpoint.digest(), self.recipe.rules, self.calibration.digest)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return cache_folder() / "calibrated" / self.key

    @contextmanager
    def locked(self, note: Callable[[str], None]) -> Iterator[None]:
        """Keep other processes out of the folder; wait while one is in there."""
        about = About(self.checkpoint.id, self.recipe.name, self.calibration.source)
        with exclusive(self.folder, f"calibrating {about.model} ({about.recipe})", note):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ABOUT).write_bytes(msgspec.json.encode(about))
            yield

    def arranged(self) -> "Workspace":
        """The same with the model's channels in the order that was found for its table."""
        path = self.channel_order
        if not path.exists() or isinstance(self.checkpoint, ArrangedCheckpoint):
            return self
        arrangement = read_arrangement(path, self.checkpoint.config.hidden_size)
        return replace(self, checkpoint=ArrangedCheckpoint(self.checkpoint, arrangement))

    def formats(self) -> dict[str, Format]:
        return self.recipe.formats(self.checkpoint.config)

    def table(self) -> StoredWeight:
        """The rounded table, once `calibrate_table` has written it."""
        shape = self.checkpoint.config.tensor_shapes()[TABLE]
        return StoredWeight(
            TABLE, shape, self.formats()[TABLE], SafetensorsFile(self.rounded_table)
        )

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _layers(self, name: str) -> LayerFiles:
        return LayerFiles(self.folder, name, len(self.checkpoint.config.kinds))

    def _borders(self, name: str) -> LayerFiles:
        """One more than there are layers: before each, and after the last."""
        return LayerFiles(self.folder, name, len(self.checkpoint.config.kinds) + 1)
