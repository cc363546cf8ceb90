"""Makes vectors of texts on ONNX Runtime. N texts, D dimensions."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.backends.ort import load_model
from gemma_runtime.embedding_bundle import EmbeddingBundle, open_embedding_bundle
from gemma_runtime.errors import ContextFull, SessionError, TokenizerError, nearest_first
from gemma_runtime.manifest import TensorRole
from gemma_runtime.session import check_runtime
from gemma_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnxruntime as ort

Vectors = NDArray[np.float32]


def open_embedder(
    bundle: EmbeddingBundle | Path | str, threads: int | None = None, *, exact: bool = False
) -> "Embedder":
    """Load a bundle that gives vectors; `exact` runs its graph with float activations.

    Raises BundleError or SessionError.
    """
    opened = bundle if isinstance(bundle, EmbeddingBundle) else open_embedding_bundle(bundle)
    return Embedder(opened, threads, "exact" if exact else "encode")


class Embedder:
    """One loaded model. Texts are run one after another, so that none is padded."""

    def __init__(self, bundle: EmbeddingBundle, threads: int | None, graph: str) -> None:
        import onnxruntime

        target = bundle.manifest.target
        check_runtime("onnxruntime", onnxruntime.__version__, target.min_runtime_version)
        self._bundle, self._manifest = bundle, bundle.manifest
        self._io = bundle.manifest.graph(graph)
        path = bundle.directory / self._io.file
        self._session: ort.InferenceSession | None = load_model(path, threads)

    @property
    def dimensions(self) -> int:
        """Of a whole vector."""
        return self._manifest.dimensions

    @property
    def prompts(self) -> dict[str, str]:
        """What a task begins a text with, by its name."""
        return dict(self._manifest.prompts)

    def embed(
        self,
        texts: Sequence[str],
        prompt: str | None = None,
        dimensions: int | None = None,
        *,
        truncate: bool = False,
    ) -> Vectors:
        """The texts' vectors of length 1: (N, D) float32.

        `prompt` names one of `prompts`, by default the bundle's own default; `dimensions` keeps the
        first D numbers, and makes their length 1 again. Raises ContextFull for a text that is too
        long, unless `truncate` cuts it.
        """
        tokens = [self.encode(text, prompt, truncate=truncate) for text in texts]
        vectors = [self.run(ids) for ids in tokens]
        whole = np.stack(vectors) if vectors else np.empty((0, self.dimensions), np.float32)
        return shorten(whole, dimensions)

    def encode(self, text: str, prompt: str | None = None, *, truncate: bool = False) -> list[int]:
        """The token ids of a text with its prompt, and what is put around it."""
        manifest = self._manifest
        ids = _joined(self._tokenizer, self._beginning(prompt), text)
        room = manifest.context_length - len(manifest.before) - len(manifest.after)
        if len(ids) > room and not truncate:
            raise ContextFull(
                f"a text has {len(ids)} tokens, {room} fit; shorten it, split it, or cut it off "
                "with --truncate"
            )
        return [*manifest.before, *ids[:room], *manifest.after]

    def run(self, tokens: Sequence[int]) -> Vectors:
        """The whole vector of some tokens, (D,)."""
        if self._session is None:
            raise SessionError("the embedder is closed")
        if not tokens:
            raise SessionError("there is no token to make a vector of; give a text")
        if len(tokens) > self._manifest.context_length:
            raise ContextFull(f"{len(tokens)} tokens, {self._manifest.context_length} fit")
        if not 0 <= min(tokens) <= max(tokens) < self._manifest.vocab_size:
            raise SessionError(f"token ids are 0 to {self._manifest.vocab_size - 1}")
        feeds = {self._io.tensor(TensorRole.TOKENS).name: np.array([tokens], np.int64)}
        try:
            (vector,) = self._session.run([self._io.tensor(TensorRole.VECTOR).name], feeds)
        except Exception as error:  # onnxruntime's exceptions share no type of their own
            raise SessionError(f"onnxruntime can't run {self._io.file}: {error}") from error
        return np.asarray(vector, np.float32).reshape(self.dimensions)

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """Opened for the first text: goldens have tokens already, and it takes a second."""
        if "tokenizer" not in self._manifest.roles:
            raise TokenizerError(
                "the bundle has no tokenizer (bundles of random weights never have one); export "
                "from a checkpoint that has a tokenizer.json"
            )
        return Tokenizer(self._bundle.path("tokenizer"))

    def _beginning(self, prompt: str | None) -> str:
        name = prompt if prompt is not None else self._manifest.default_prompt
        if name is None:
            return ""
        if name not in self._manifest.prompts:
            known = nearest_first(name, self._manifest.prompts) or "none"
            raise SessionError(f"unknown prompt {name!r}; the bundle has: {known}")
        return self._manifest.prompts[name]


def _joined(tokenizer: Tokenizer, prompt: str, text: str) -> list[int]:
    """The ids of a prompt and a text as one string. Only the prompt can write control tokens."""
    ids: list[int] = []
    before = ""  # of the text
    for part in tokenizer.split_control(prompt):
        if isinstance(part, str):
            before = part
        else:
            ids += [*tokenizer.encode(before), part]
            before = ""
    return ids + tokenizer.encode(before + text)


def shorten(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first numbers of each vector, (N, D), with their length made 1 again."""
    whole = vectors.shape[-1]
    if dimensions is None or dimensions == whole:
        return vectors
    if not 1 <= dimensions <= whole:
        raise SessionError(f"{dimensions} dimensions, expected 1 to {whole}")
    cut = vectors[:, :dimensions]
    lengths = np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12)
    shortened: Vectors = (cut / lengths).astype(np.float32)
    return shortened
