"""The manifest of a bundle that gives vectors, and how such a bundle is opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from gemma_runtime.bundle import (
    Bundle,
    check_files,
    digest_of_manifest,
    find_role,
    open_bundle,
    read_manifest,
)
from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import (
    ENCODER,
    File,
    Graph,
    Model,
    Quantization,
    Target,
    decode_manifest,
    read_schema,
)
from gemma_runtime.manifest_sizes import LARGEST, VOCABULARY, check_graphs, check_numbers

_DIMENSIONS = 1 << 20


@dataclass(frozen=True, slots=True)
class VectorAgreement:
    """The distance between two sets of vectors of the same texts, without a verdict."""

    texts: int
    mean_cosine: float
    min_cosine: float  # of the text whose two vectors differ most


@dataclass(frozen=True, slots=True)
class EmbeddingManifest:
    """All that a device needs to know to make vectors of texts."""

    schema_version: int
    kind: str  # "encoder"
    model: Model
    target: Target
    quantization: Quantization
    vocab_size: int
    context_length: int  # most tokens of a text, with the prompt and what is put around it
    dimensions: int  # of a vector
    before: tuple[int, ...]  # tokens before every text
    after: tuple[int, ...]
    prompts: dict[str, str]  # what a task begins a text with, by its name
    default_prompt: str | None
    # "encode", and in quantized bundles "exact" (float activations): tokens → vector.
    graphs: dict[str, Graph]
    quality: VectorAgreement  # quantized reference against float32 reference, on the goldens
    files: dict[str, File]  # path in the bundle -> digest, for all files but manifest.json
    roles: dict[str, str]  # "tokenizer", "goldens" -> path in the bundle
    tools: dict[str, str]  # package -> version that wrote the bundle

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Parse a manifest. Raises BundleError for another kind or schema, or an invalid field."""
        manifest = decode_manifest(text, ENCODER, cls)
        manifest._check()
        return manifest

    def graph(self, name: str) -> Graph:
        """A graph by its name. Raises BundleError if it is missing."""
        if name not in self.graphs:
            raise BundleError(f"manifest.json has no graph {name}; export again")
        return self.graphs[name]

    def _check(self) -> None:
        check_numbers(self, vocab_size=VOCABULARY, context_length=LARGEST, dimensions=_DIMENSIONS)
        check_graphs([[graph] for graph in self.graphs.values()])
        around = len(self.before) + len(self.after)
        if around >= self.context_length:
            raise BundleError(
                f"manifest.json is not valid: {around} tokens around a text, and a context of "
                f"{self.context_length}; export again"
            )
        if self.default_prompt not in (None, *self.prompts):
            raise BundleError(
                "manifest.json is not valid: default_prompt is none of the prompts; export again"
            )


@dataclass(frozen=True, slots=True)
class EmbeddingBundle:
    """An opened folder. All paths in its manifest are inside the folder."""

    directory: Path
    manifest: EmbeddingManifest

    def path(self, role: str) -> Path:
        """The file of a role, e.g. `tokenizer`. Raises BundleError if there is none."""
        return find_role(self.directory, self.manifest.roles, role)

    def digest(self) -> str:
        """sha256 of the manifest, which has the digests of all files."""
        return digest_of_manifest(self.directory)


def open_embedding_bundle(directory: Path | str) -> EmbeddingBundle:
    """Open a bundle that gives vectors. Raises BundleError unless all files match."""
    directory = Path(directory)
    manifest = EmbeddingManifest.from_json(read_manifest(directory))
    graphs = {graph.file for graph in manifest.graphs.values()}
    check_files(directory, manifest.files, graphs | set(manifest.roles.values()))
    return EmbeddingBundle(directory, manifest)


def open_any_bundle(directory: Path) -> Bundle | EmbeddingBundle:
    """Open a bundle that generates text, or one that gives vectors."""
    return open_embedding_bundle(directory) if gives_vectors(directory) else open_bundle(directory)


def gives_vectors(directory: Path) -> bool:
    """Whether a bundle gives vectors. Raises BundleError if it has no manifest."""
    return read_schema(read_manifest(directory)).kind == ENCODER
