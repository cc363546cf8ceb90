"""The files of one calibration: their content, writers and readers.

They lie in a folder of the cache whose name depends on model, rules and text. Every file is written
completely or not at all, so interrupted work resumes after the last one. `calibrated.STAGES` lists
the work in order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.computing import CPU
from gemma_export.digest import digest_of
from gemma_export.formats.format import FLOAT, Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import HEAD, PER_LAYER_PROJECTION, TABLE
from gemma_export.model.ops import Weight
from gemma_export.quantize.calibrate.arrange import ArrangedCheckpoint, read_arrangement
from gemma_export.quantize.calibrate.layer_files import FlowFiles, LayerFiles
from gemma_export.quantize.calibrate.rewritten import RewrittenCheckpoint
from gemma_export.quantize.calibrate.smoothed import SmoothedCheckpoint
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.recipe import Recipe
from gemma_export.quantize.store import PassingWeight, StoredWeight
from gemma_runtime.cache import ABOUT, About, cache_folder

_VERSION = "9"  # increase it when the codes or the files of calibration change


# Files of matrices outside the layers that are rounded by text.
_ROUNDED = {
    TABLE: "rounded-table",
    HEAD: "rounded-head",
    PER_LAYER_PROJECTION: "rounded-per-layer-projection",
}


def curvature_name(matrix: str) -> str:
    """Name in its file of the curvature of the table or of a head apart from it."""
    return "curvature" if matrix == TABLE else f"curvature.{matrix}"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A model, a recipe and a calibration text, with the folder for intermediate files.

    `device` computes: `rows`, `open` and `curvature` give tensors there. Weights that are read to
    be looked up in, or to be written, stay on the host.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: Calibration
    device: torch.device = CPU

    # Files, in the order in which they are written.

    @property
    def smoothing_residuals(self) -> FlowFiles:
        """The float model's residuals for the first sequences; only the newest is kept.

        Written and deleted by `smooth`.
        """
        return self._flow("smoothing-residual")

    @property
    def smoothing(self) -> LayerFiles:
        """Column factors by matrix, a file per layer; the last one has the head's.

        Written by `smooth`, read by `arranged`. If the last exists, smoothing is complete.
        """
        return self._borders("smoothing")

    @property
    def head_curvature(self) -> Path:
        """The curvature of a smooth or weighted head.

        Written by `smooth`, read by `calibrate_table`.
        """
        return self._file("head-curvature")

    @property
    def float_residuals(self) -> FlowFiles:
        """The float model's residuals between layers, for the first sequences.

        Written by `start_backward`, read by `backward_layer` and `measure_losses`, deleted by
        `end_backward`.
        """
        return self._flow("float-residual")

    @property
    def errors(self) -> LayerFiles:
        """Gradients with respect to those residuals and to keys and values that earlier layers
        lend, and the label terms of the table's gradient.

        `start_backward` writes the last one. `store_errors` writes one layer's after another and
        deletes the previous one. Read by `backward_layer` and `table_information`.
        """
        return self._borders(f"errors{shards.suffix()}")

    @property
    def part_errors(self) -> LayerFiles:
        """Gradients with respect to the per-layer embeddings, by layer.

        Written by `store_errors`, read by `table_information`.
        """
        return self._layers(f"part-errors{shards.suffix()}")

    @property
    def losses(self) -> LayerFiles:
        """Loss of each rounded matrix (--bits). Written and read by `measure_losses`."""
        return self._layers("loss")

    @property
    def table_losses(self) -> Path:
        """Losses of the rounded table. If it exists, measuring is complete."""
        return self._file("loss-table")

    @property
    def channel_order(self) -> Path:
        """The order of channels, the column factors, and curvatures by `curvature_name`.

        Written by `weigh_table`. Read by `arranged` and `calibrate_table`.
        """
        return self._file("channel-order")

    @property
    def teacher_residuals(self) -> FlowFiles:
        """The float model's residuals for all sequences; only the newest file is kept.

        Written by `pass_teacher`. `distill` reads the last one, which is then deleted.
        """
        return self._flow("teacher-residual")

    def rounded_table(self, name: str = TABLE) -> Path:
        """The codes of the table, of a head apart from it, or of the per-layer projection.

        Written by `calibrate_table`; read by `table` and the store. Distillation doesn't change
        them.
        """
        return self._file(_ROUNDED[name])

    @property
    def residuals(self) -> FlowFiles:
        """The rounded model's residuals; only the newest is kept. Only `calibrate` uses them."""
        return self._flow("residual")

    @property
    def rounded_layers(self) -> LayerFiles:
        """Codes and balanced gains of a layer.

        Written by `calibrate`. Read by `calibrate` for the next layer, by `Student` and the store.
        """
        return self._layers("rounded")

    @property
    def learning(self) -> Path:
        """The folder of `Student`'s parameters, updated in place and deleted at the end."""
        return self.folder / "learning"

    def saved(self) -> list[Path]:
        """Copies of `learning` after some step, from which interrupted distillation resumes."""
        return sorted(self.folder.glob("saved-*"))

    def saved_at(self, step: int) -> Path:
        """Written and read by `Student`. The name contains the number of completed steps."""
        return self.folder / f"saved-{step:06d}"

    @property
    def distilled_layers(self) -> LayerFiles:
        """Like `rounded_layers`, after distillation. `Student.write` writes it for the store."""
        return self._layers("distilled")

    @property
    def distilled_gain(self) -> Path:
        """The learned final gain. If it exists, distillation is complete."""
        return self._file("distilled-gain")

    def cache_residuals(self, context: int) -> FlowFiles:
        """The stored model's residuals; only the newest is kept. `measure_caches` uses them."""
        return self._flow(f"cache-residual-{context}")

    def cache_scales(self, context: int) -> LayerFiles:
        """Scales of int8 caches that hold `context` tokens, a file per layer.

        Written by `measure_caches`, read by `measured_scales`. If the last exists, it is complete.
        """
        return self._layers(f"cache-scales-{context}")

    # The input.

    @property
    def key(self) -> str:
        parts = (_VERSION, self.checkpoint.digest(), self.recipe.rules, self.calibration.digest)
        # Another order of sums gives other codes.
        own = () if self.device == CPU else (self.device.type,)
        return digest_of((*parts, *own))[:32]

    @property
    def folder(self) -> Path:
        return cache_folder() / "calibrated" / self.key

    @contextmanager
    def locked(self, note: Callable[[str], None]) -> Iterator[None]:
        """Keep processes that are not ranks of this work out of the folder. Waits for a process
        that is using it.
        """
        about = About(self.checkpoint.id, self.recipe.name, self.calibration.source)
        with shards.exclusive(self.folder, f"calibrating {about.model} ({about.recipe})", note):
            shards.from_first(lambda: self._describe(about))
            yield

    def _describe(self, about: About) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABOUT).write_bytes(msgspec.json.encode(about))

    def arranged(self) -> "Workspace":
        """The workspace of the model as it is rounded: with column factors and reordered channels,
        once `smoothing` and `channel_order` exist.
        """
        checkpoint = self.checkpoint
        if isinstance(checkpoint, RewrittenCheckpoint):
            return self
        if self.smoothing.last.exists():
            files = [SafetensorsFile(path) for path in self.smoothing]
            factors = {n: f.rows(n, 0, i.shape[0]) for f in files for n, i in f.tensors.items()}
            checkpoint = SmoothedCheckpoint(checkpoint, factors)
        if self.channel_order.exists():
            arrangement = read_arrangement(self.channel_order, checkpoint.config.hidden_size)
            checkpoint = ArrangedCheckpoint(checkpoint, arrangement)
        return replace(self, checkpoint=checkpoint)

    @property
    def table_factors(self) -> Tensor | None:
        """(M,) factors of the table's columns, which each looked-up row is divided by."""
        checkpoint = self.checkpoint
        if isinstance(checkpoint, ArrangedCheckpoint):
            if checkpoint.arrangement.factors is not None:
                return checkpoint.arrangement.factors
            checkpoint = checkpoint.source
        if isinstance(checkpoint, SmoothedCheckpoint) and checkpoint.config.tied:
            return checkpoint.head_factors
        return None

    def end_backward(self) -> None:
        """Delete the text's files of the backward pass, also those of another number of ranks."""
        shards.wait()
        shards.from_first(lambda: self._delete(("errors", "part-errors", "float-residual")))

    def end_rounding(self) -> None:
        """Delete all of the text's files: they are large and no longer needed."""
        self.end_backward()
        names = ("smoothing-residual", "teacher-residual", "residual")
        shards.from_first(lambda: self._delete(names))

    def open(self, path: Path) -> SafetensorsFile:
        """A file of the folder, read to the device."""
        return SafetensorsFile(path, self.device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a weight before rounding, float32, on the device."""
        return self.checkpoint.rows(name, start, stop).to(self.device)

    def formats(self) -> dict[str, Format]:
        return self.recipe.formats(self.checkpoint.config)

    def weight(self, name: str) -> SourceWeight:
        """A weight before rounding; the table with its factors."""
        shape = self.checkpoint.config.tensor_shapes()[name]
        factors = self.table_factors if name == TABLE else None
        return SourceWeight(name, shape, self.checkpoint, factors)

    def rounded(self, name: str) -> Weight:
        """A weight outside the layers after rounding, once `calibrate_table` has run."""
        if name in _ROUNDED and self.rounded_table(name).exists():
            return self.table(name)
        shape, fmt = self.checkpoint.config.tensor_shapes()[name], self.formats().get(name, FLOAT)
        return PassingWeight(name, shape, fmt, self.checkpoint, self.recipe)

    def table(self, name: str = TABLE) -> StoredWeight:
        """The rounded table, or a head apart from it, once `calibrate_table` has written it."""
        shape = self.checkpoint.config.tensor_shapes()[name]
        file = SafetensorsFile(self.rounded_table(name))
        return StoredWeight(name, shape, self.formats()[name], file)

    def curvature(self, name: str) -> Tensor | None:
        """(M, M) of the error of a row of the table, or of a head apart from it.

        None for a smooth or weighted table that is only looked up: `smooth` sees the inputs of the
        head alone.
        """
        config = self.checkpoint.config
        if not self.recipe.rule(name).observes_inputs:
            path = self.channel_order
        elif name == config.head:
            path = self.head_curvature
        else:
            return None
        return self.open(path).rows(curvature_name(name), 0, config.hidden_size)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _layers(self, name: str) -> LayerFiles:
        return LayerFiles(self.folder, name, len(self.checkpoint.config.kinds), self.device)

    def _flow(self, name: str) -> FlowFiles:
        borders = len(self.checkpoint.config.kinds) + 1
        return FlowFiles(self.folder, name + shards.suffix(), borders, self.device)

    def _borders(self, name: str) -> LayerFiles:
        """One file per boundary: before each layer, and after the last."""
        return LayerFiles(self.folder, name, len(self.checkpoint.config.kinds) + 1, self.device)

    def _delete(self, names: tuple[str, ...]) -> None:
        for path in (path for name in names for path in self.folder.glob(f"{name}-*.safetensors")):
            path.unlink()
