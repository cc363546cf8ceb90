"""Says which bundle figures are of, and on which machine they were measured."""

from dataclasses import dataclass

import msgspec

from gemma_runtime.bundle import Bundle
from gemma_runtime.embedding_bundle import EmbeddingBundle
from gemma_runtime.machine import Machine, describe_machine


@dataclass(frozen=True, slots=True)
class Subject:
    bundle: str  # folder, as it was given
    digest: str  # `Bundle.digest`
    machine: Machine


def describe_subject(bundle: Bundle | EmbeddingBundle) -> Subject:
    return Subject(
        bundle=str(bundle.directory),
        digest=bundle.digest(),
        machine=describe_machine(bundle.manifest.target.packages),
    )


def with_subject(bundle: Bundle | EmbeddingBundle, figures: object) -> dict[str, object]:
    """The fields of a dataclass, after those of its subject."""
    named: dict[str, object] = msgspec.to_builtins(describe_subject(bundle))
    fields: dict[str, object] = msgspec.to_builtins(figures)
    return named | fields
