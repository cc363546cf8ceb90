"""Checkpoints: one interface to read tensors by blocks of rows from any file format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gemma_export.checkpoint.generation import GenerationDefaults
from gemma_export.model.config import GemmaConfig, is_gain
from gemma_runtime.errors import CheckpointError
from gemma_runtime.manifest import Model

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(Protocol):
    """Weights by Hugging Face name, e.g. `model.layers.0.mlp.up_proj.weight`."""

    @property
    def id(self) -> str:
        """Hub id, folder or file name, or `random:SEED`."""
        ...

    @property
    def revision(self) -> str | None: ...

    @property
    def config(self) -> GemmaConfig: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences the user should see, e.g. that the vision tower is left out."""
        ...

    @property
    def generation(self) -> GenerationDefaults:
        """Stop tokens and sampling values from the files beside the config."""
        ...

    def rows(self, name: str, start: int, stop: int) -> "Tensor":
        """Rows [start, stop) of a tensor as float32. Reads only those rows."""
        ...

    def digest(self) -> str:
        """sha256 over config and weights, in hex."""
        ...

    def tokenizer(self) -> "TokenizerFiles | None":
        """The tokenizer's files; None if there are none, as for random weights."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A `tokenizer.json`, its chat template, and the token that the template calls `eos_token`."""

    tokenizer_json: bytes
    chat_template: str | None
    eos: str = "<eos>"
    notes: tuple[str, ...] = ()  # sentences the user should see


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """An unquantized weight of a checkpoint, for the float32 reference."""

    name: str
    shape: tuple[int, ...]
    checkpoint: Checkpoint
    factors: "Tensor | None" = None

    def rows(self, start: int, stop: int) -> "Tensor":
        return self.checkpoint.rows(self.name, start, stop)


def describe_model(checkpoint: Checkpoint) -> Model:
    """The checkpoint, as manifests name it."""
    config = checkpoint.config
    return Model(
        id=checkpoint.id,
        family=config.family,
        parameters=config.parameters,
        revision=checkpoint.revision,
        digest=checkpoint.digest(),
        looked_up=config.looked_up,
    )


def our_values(config: GemmaConfig, name: str, stored: "Tensor") -> "Tensor":
    """A stored weight as `Checkpoint.rows` gives it: of a norm's gain, gain - 1."""
    return stored - 1 if config.plain_gains and is_gain(name) else stored


def check_tensors(
    where: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError naming the tensor if one is missing, unexpected or of wrong shape."""
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{where}: tensor {name} is missing, expected shape {shape}")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {shapes[name]}, the config says {shape}"
            )
    if left := sorted(set(shapes) - set(expected)):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"{where}: tensor {left[0]}{more} is not part of this Gemma")


def check_finite(where: Path, name: str, values: "Tensor") -> None:
    """Raise CheckpointError naming the tensor if it contains NaN or Inf."""
    import torch  # here, so that the size of a model is known without it

    # aminmax propagates NaN and Inf, and is 25 times faster than testing every element.
    if values.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        raise CheckpointError(f"{where}: tensor {name} contains NaN or Inf; the file is damaged")
