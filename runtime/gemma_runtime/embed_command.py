"""The command `embed`: vectors of texts, and how alike they are."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.command import print_json, print_shown
from gemma_runtime.errors import EvaluationError
from gemma_runtime.options import BundlePath, Json, Threads

if TYPE_CHECKING:  # imported when needed, so --help starts fast
    from rich.table import Table

    from gemma_runtime.embedding.embedder import Embedder, Vectors

_SHOWN_NUMBERS, _SHOWN_TEXT, _MOST_COMPARED = 4, 40, 12


@dataclass(frozen=True, slots=True)
class TextVector:
    text: str  # without the prompt
    tokens: int  # with the prompt, and what is put around it
    seconds: float
    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Embeddings:
    bundle: str
    digest: str  # of the bundle, see `EmbeddingBundle.digest`
    prompt: str | None  # its name
    dimensions: int
    texts: tuple[TextVector, ...]


def embed(
    bundle: BundlePath,
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT", help="Texts; - reads one from each line of stdin."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The task, by the name of one of the bundle's prompts, e.g. query or document. "
            "\\[the bundle's default, if it has one]",
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(min=1, help="Keep only so many numbers of each vector, of length 1 again."),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long, instead of refusing.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE.npy", help="Write the vectors as a NumPy array."
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Make vectors of texts, for search and comparison, and print how alike the texts are.

    Of two vectors of length 1, the product is the cosine: 1 for the same direction.
    """
    from gemma_runtime.embedding.embedder import open_embedder
    from gemma_runtime.embedding_bundle import open_embedding_bundle

    given = list(_read(texts))
    if not given:
        raise EvaluationError("stdin has no text; give a text in each line")
    opened = open_embedding_bundle(bundle)
    with open_embedder(opened, threads) as embedder:
        _hint(embedder, prompt or opened.manifest.default_prompt)
        found = [_embed(embedder, text, prompt, dimensions, truncate) for text in given]
    made = Embeddings(
        bundle=str(opened.directory),
        digest=opened.digest(),
        prompt=prompt or opened.manifest.default_prompt,
        dimensions=dimensions or opened.manifest.dimensions,
        texts=tuple(found),
    )
    if output is not None:
        _save(output, made)
    if json:
        print_json(made)
    else:
        print_shown(*render_embeddings(made))


def _read(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        if text == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield text


def _hint(embedder: "Embedder", prompt: str | None) -> None:
    if prompt is None and embedder.prompts:
        names = ", ".join(embedder.prompts)
        print(f"without a prompt; the model was trained with --prompt {names}", file=sys.stderr)


def _embed(
    embedder: "Embedder", text: str, prompt: str | None, dimensions: int | None, truncate: bool
) -> TextVector:
    from gemma_runtime.embedding.embedder import shorten

    tokens = embedder.encode(text, prompt, truncate=truncate)
    started = time.perf_counter()
    vector = shorten(embedder.run(tokens)[None], dimensions)[0]
    return TextVector(text, len(tokens), time.perf_counter() - started, tuple(vector.tolist()))


def _save(path: Path, made: Embeddings) -> None:
    import numpy as np

    from gemma_runtime.staging import staged_file

    try:
        with staged_file(path) as partial, partial.open("wb") as file:
            np.save(file, _stacked(made))
    except OSError as error:
        raise EvaluationError(f"can't write {path}: {error.strerror}") from error


def _stacked(made: Embeddings) -> "Vectors":
    import numpy as np

    return np.array([one.vector for one in made.texts], np.float32)


def render_embeddings(made: Embeddings) -> "list[Table]":
    """A table of the texts, and one of their cosines if they are several, but few."""
    from rich.table import Table
    from rich.text import Text

    texts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "text", "tokens", "ms", f"of {made.dimensions} numbers"):
        texts.add_column(heading, justify="left" if heading == "text" else "right")
    for number, one in enumerate(made.texts, 1):
        first = " ".join(f"{x:.3f}" for x in one.vector[:_SHOWN_NUMBERS])
        short = one.text if len(one.text) <= _SHOWN_TEXT else one.text[: _SHOWN_TEXT - 1] + "…"
        ms = f"{one.seconds * 1e3:.0f}"
        texts.add_row(str(number), Text(short), str(one.tokens), ms, f"{first} …")
    if not 1 < len(made.texts) <= _MOST_COMPARED:
        return [texts]
    vectors = _stacked(made)
    cosines = Table(title="cosines", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", *(str(number) for number in range(1, len(vectors) + 1))):
        cosines.add_column(heading, justify="right")
    for number, row in enumerate((vectors @ vectors.T).tolist(), 1):
        cosines.add_row(str(number), *(f"{x:.3f}" for x in row))
    return [texts, cosines]
