"""What is calibrated for which text, in a folder that keeps the progress."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import TABLE
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.arrange import ArrangedCheckpoint, read_arrangement
from gemma_export.quantize.calibrate.stream import advance_flow, load_layer, start_flow
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.recipe import Recipe
from gemma_export.quantize.store import StoredWeight
from gemma_runtime.cache import cache_folder

_VERSION = "7"  # of what calibration does: raise it when codes change


@dataclass(frozen=True, slots=True)
class Calibrator:
    """What is rounded for which text, in a folder that keeps the progress."""

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: Calibration

    @property
    def key(self) -> str:
        rules = self.recipe.rules
        parts = (_VERSION, self.checkpoint.digest(), rules, self.calibration.digest)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return cache_folder() / "calibrated" / self.key

    def file(self, part: str, index: int | None = None) -> Path:
        name = part if index is None else f"{part}-{index:02d}"
        return self.folder / f"{name}.safetensors"

    def arranged(self) -> "Calibrator":
        """The same of the model with its channels in the order that was found for its table."""
        path = self.file("order")
        if not path.exists() or isinstance(self.checkpoint, ArrangedCheckpoint):
            return self
        arrangement = read_arrangement(path, self.checkpoint.config.hidden_size)
        return replace(self, checkpoint=ArrangedCheckpoint(self.checkpoint, arrangement))

    def formats(self) -> dict[str, Format]:
        return self.recipe.formats(self.checkpoint.config)

    def table(self) -> StoredWeight:
        """The rounded table, once `calibrate_table` has left it."""
        shape = self.checkpoint.config.tensor_shapes()[TABLE]
        return StoredWeight(
            TABLE, shape, self.formats()[TABLE], SafetensorsFile(self.file("table"))
        )


def pass_layers(
    work: Calibrator, tick: Tick, part: str, sequences: int | None = None, *, keep: bool = False
) -> Path:
    """Take the first sequences, or all, past the float model: a file `part` for every layer.

    Returns the path of the last one. The others stay if they are to be kept.
    """
    config, checkpoint = work.checkpoint.config, work.checkpoint
    count = len(config.kinds)
    first = next((i for i in range(count, -1, -1) if work.file(part, i).exists()), None)
    if first is None:
        first, tokens = 0, work.calibration.tokens[:sequences]
        arranged = checkpoint if isinstance(checkpoint, ArrangedCheckpoint) else None
        factors = arranged.arrangement.factors if arranged else None
        table = SourceWeight(TABLE, config.tensor_shapes()[TABLE], checkpoint, factors)
        start_flow(work.file(part, 0), config, tokens, table)
    for layer in config.layers[first:]:
        source, weights = work.file(part, layer.index), load_layer(checkpoint, layer.index)
        advance_flow(source, work.file(part, layer.index + 1), config, layer, weights)
        if not keep:
            source.unlink()
        tick(f"layer {layer.index}, float", 4 * sum(w.numel() for w in weights.values()))
    return work.file(part, count)
