"""What a search file may say. Names and paths are checked in `cells` and `question`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from gemma_export.search.yaml_file import read_yaml

Scalar = str | int | bool
T = TypeVar("T")


def listed(value: T | tuple[T, ...]) -> tuple[T, ...]:
    """Choices of which a file may give one alone, or several."""
    return value if isinstance(value, tuple) else (value,)


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint, with the meaning of the flags of the same names."""

    checkpoint: str | None = None
    size: str | None = None
    family: str | None = None
    base: str | None = None
    adapters: tuple[str, ...] = ()
    revision: str | None = None
    config: str | None = None


class RecipeChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named recipe or a recipe file; each budget of bits and each group makes one of its own."""

    quant: str | None = None
    file: str | None = None
    bits: float | tuple[float, ...] | None = None
    group: int | tuple[int, ...] | None = None


class Tasks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tasks of lm-evaluation-harness, with the meaning of the flags of `gemma-runtime lm-eval`."""

    names: str | tuple[str, ...]
    include: str | tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False


class Bench(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How speed and memory are measured, with the meaning of the flags of `gemma-runtime bench`."""

    repeats: int = 3
    new_tokens: int = 64
    threads: int | None = None


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bundle to take must keep to. Bytes may be text such as 1.3 GiB."""

    size: str | int | None = None  # at most
    resident: str | int | None = None  # at most
    decode: float | None = None  # tokens/s, at least
    prefill: float | None = None  # tokens/s, at least
    first_token: float | None = None  # seconds, at most
    load: float | None = None  # seconds, at most
    kl: float | None = None  # nats, at most
    weights_kl: float | None = None  # nats, at most
    top1: float | None = None  # share, at least
    score: float | None = None  # at least
    minutes: float | None = None  # that an export may take


Choices = str | tuple[str, ...]
Numbers = int | tuple[int, ...]


class SearchFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    checkpoints: str | Model | tuple[str | Model, ...]
    targets: (
        str
        | dict[str, Scalar | tuple[Scalar, ...]]
        | tuple[str | dict[str, Scalar | tuple[Scalar, ...]], ...]
    )
    recipes: str | RecipeChoice | tuple[str | RecipeChoice, ...] | None = None
    context: Numbers | None = None
    prefill: Numbers | None = None
    cache: Choices | None = None
    text: str | None = None
    calibration: str | None = None
    tasks: str | tuple[str, ...] | Tasks | None = None
    budget: Limits = Limits()
    objectives: Choices | None = None
    bench: Bench = Bench()
    max_ram: str | int | None = None
    device: str = "auto"
    max_vram: str | int | None = None


_PARTS: Mapping[str, type[msgspec.Struct]] = {
    "checkpoints": Model,
    "recipes": RecipeChoice,
    "tasks": Tasks,
    "budget": Limits,
    "bench": Bench,
}


def read_search(path: Path) -> SearchFile:
    """Read a search file. Raises SearchError, with the place of the mistake."""
    return read_yaml(path, SearchFile, _PARTS)
