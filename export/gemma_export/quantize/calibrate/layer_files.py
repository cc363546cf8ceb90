"""Names of files that exist once per layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_export.computing import CPU


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """One file per layer, or per boundary between layers, by index."""

    folder: Path
    name: str
    count: int
    device: torch.device = CPU  # where their content is read to

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
class FlowFiles(LayerFiles):
    """Residuals of a text before each layer and after the last, and what else layers read of it."""

    @property
    def parts(self) -> Path:
        """The per-layer embeddings of the whole text, by layer."""
        return self.folder / f"{self.name}-parts.safetensors"

    def lent(self, index: int) -> Path:
        """The keys and values of a layer that later ones read."""
        return self.folder / f"{self.name}-lent-{index:02d}.safetensors"

    def delete(self) -> None:
        for path in (*self, self.parts, *(self.lent(index) for index in range(self.count))):
            path.unlink(missing_ok=True)
