"""A checkpoint with other weights whose model computes the same logits."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.checkpoint.generation import GenerationDefaults
from gemma_export.model.config import GemmaConfig


@dataclass(frozen=True, slots=True)
class RewrittenCheckpoint(ABC):
    source: Checkpoint

    @property
    def id(self) -> str:
        return self.source.id

    @property
    def revision(self) -> str | None:
        return self.source.revision

    @property
    def config(self) -> GemmaConfig:
        return self.source.config

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    @property
    def generation(self) -> GenerationDefaults:
        return self.source.generation

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the rewritten weight, float32."""

    def digest(self) -> str:
        """The source's digest: it is the same model."""
        return self.source.digest()

    def tokenizer(self) -> TokenizerFiles | None:
        return self.source.tokenizer()
