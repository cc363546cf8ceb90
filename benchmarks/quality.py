"""Measures the quality loss of each recipe: KL and top-1 agreement with the float32 bundle.

    python benchmarks/quality.py --checkpoint demo --text benchmarks/text.txt

Exports the checkpoint once per recipe, scores the text with each bundle, and compares the full
distributions at every position. A blank line in the text starts a new segment. `--text` may also be
a folder with files for each language, such as language_texts.py writes. The table tells where a
recipe loses most: in which language, or in which segment of a file.

`NAME@BITS` means a recipe with a budget (`--quant NAME --bits BITS`), and `+int8-cache` after it
means int8 caches (`--cache int8`). `llama.cpp-q4_0` means the codes of llama.cpp's own Q4_0
quantizer, exported unchanged.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.gguf_header import ALIGNMENT, write_header
from gemma_export.model.config import TABLE
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import ConsoleReporter
from gemma_export.quantize.recipe import RECIPES, find_recipe
from gemma_export.targets.gguf.metadata import model_metadata
from gemma_export.targets.gguf.vocabulary import gguf_vocabulary
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.gguf_names import gguf_name
from gemma_runtime.proof.texts import language_of, read_segments
from gemma_runtime.session import open_session
from gemma_runtime.text.tokenizer import load_tokenizer

_LLAMA = "llama.cpp-q4_0"
_INT8_CACHE = "+int8-cache"
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quality:
    recipe: str
    bits_per_weight: float
    artifact_bytes: int
    positions: int
    mean_kl: float  # nats, over the whole vocabulary
    median_kl: float
    p99_kl: float
    top1: float
    perplexity: float
    reference_perplexity: float  # of the float32 bundle
    worst: str  # the language, or the number of the segment, with the largest mean KL
    worst_kl: float
    median_language_kl: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("text.txt"))
    parser.add_argument("--recipes", nargs="+", default=_onnx_recipes())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=True)
    segments = read_segments(options.text)
    with TemporaryDirectory() as folder:
        teacher = _export(options.checkpoint, "none", Path(folder))
        references = {name: _score(teacher, text) for name, text in segments.items()}
        results = []
        for recipe in options.recipes:
            bundle = _export(options.checkpoint, recipe, Path(folder))
            results.append(_measure(recipe, bundle, references))
            console.print(results[-1])  # at once: a recipe may take half an hour
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(results) + b"\n")
    else:
        Console().print(_table(results))


def _onnx_recipes() -> list[str]:
    """All recipes but `none`, which is the reference, and those ONNX Runtime has no kernel for."""
    return [
        name
        for name, recipe in RECIPES.items()
        if name != "none" and not any(rule.format.per_channel for rule in recipe.rules)
    ]


def _export(checkpoint: str, recipe: str, folder: Path) -> Bundle:
    if recipe == _LLAMA:
        source = _write_llama_q4_0(open_checkpoint(checkpoint), folder / "q4_0.gguf")
        checkpoint, recipe = str(source), "source"
    name, _, bits = recipe.removesuffix(_INT8_CACHE).partition("@")
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe(name),
        checkpoint=checkpoint,
        bits=float(bits) if bits else None,
        context_length=1024,
        cache="int8" if recipe.endswith(_INT8_CACHE) else None,
        output=folder / recipe,
    )
    return export_bundles(request, ConsoleReporter(Console(stderr=True)))[0].bundle


def _write_llama_q4_0(checkpoint: Checkpoint, path: Path) -> Path:
    """Quantize as `llama-quantize … Q4_0` does: matrices to Q4_0, gains in float32.

    llama.cpp stores the tied table in Q6_K, or in Q8_0 if the row length is not a multiple of 256,
    as in the 270M. This function always uses Q8_0, which is at least as accurate.
    """
    shapes = checkpoint.config.tensor_shapes()
    metadata = model_metadata(checkpoint.id, checkpoint.config) | gguf_vocabulary(checkpoint)
    with path.open("wb") as file:
        write_header(file, metadata, {gguf_name(n): (s, _type(n, s)) for n, s in shapes.items()})
        for name, shape in shapes.items():
            for span in row_blocks(shape):
                rows = checkpoint.rows(name, *span).numpy()
                stored = np.float32(1) + rows if len(shape) == 1 else rows
                file.write(quantize(stored, _type(name, shape)).tobytes())
            file.write(bytes(-file.tell() % ALIGNMENT))
    return path


def _type(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q8_0 if name == TABLE else GGMLQuantizationType.Q4_0


def _score(bundle: Bundle, text: str) -> tuple[list[int], Logits]:
    """The segment's tokens, and the log-probabilities of the next token after each: (T, V)."""
    tokens = [bundle.manifest.bos_token, *load_tokenizer(bundle).encode(text)][:256]
    return tokens, _run(bundle, tokens)


def _run(bundle: Bundle, tokens: list[int]) -> Logits:
    with open_session(bundle) as session:
        logits = session.score(tokens)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64))
    return logits


def _measure(
    recipe: str, bundle: Bundle, references: Mapping[str, tuple[list[int], Logits]]
) -> Quality:
    kl, same, likelihoods, reference_likelihoods = [], [], [], []
    by_language = defaultdict(list)
    for name, (tokens, reference) in references.items():
        scored = _run(bundle, tokens)
        kl.append((np.exp(reference) * (reference - scored)).sum(-1, dtype=np.float64))
        by_language[language_of(name)].append(kl[-1])
        same.append(reference.argmax(-1) == scored.argmax(-1))
        rows = np.arange(len(tokens) - 1)
        likelihoods.append(scored[rows, tokens[1:]])
        reference_likelihoods.append(reference[rows, tokens[1:]])
    all_kl = np.concatenate(kl)
    means = {name: float(np.concatenate(parts).mean()) for name, parts in by_language.items()}
    worst = max(means, key=means.__getitem__)
    return Quality(
        recipe=recipe,
        bits_per_weight=bundle.manifest.quantization.bits_per_weight,
        artifact_bytes=sum(
            file.bytes for name, file in bundle.manifest.files.items() if "onnx" in name
        ),
        positions=len(all_kl),
        mean_kl=float(all_kl.mean()),
        median_kl=float(np.median(all_kl)),
        p99_kl=float(np.quantile(all_kl, 0.99)),
        top1=float(np.concatenate(same).mean()),
        perplexity=float(np.exp(-np.concatenate(likelihoods).mean())),
        reference_perplexity=float(np.exp(-np.concatenate(reference_likelihoods).mean())),
        worst=worst,
        worst_kl=means[worst],
        median_language_kl=float(np.median(list(means.values()))),
    )


def _table(results: list[Quality]) -> Table:
    table = Table(title=f"{results[0].positions} positions, against the float32 bundle")
    headings = ("recipe", "bits", "MB", "mean KL", "worst", "median", "p99", "top-1", "perplexity")
    for heading in headings:
        table.add_column(heading)
    for q in results:
        table.add_row(
            q.recipe,
            f"{q.bits_per_weight:.2f}",
            f"{q.artifact_bytes / 1e6:.0f}",
            f"{q.mean_kl:.4f}",
            f"{q.worst}: {q.worst_kl:.4f} (×{q.worst_kl / q.median_language_kl:.1f})",
            f"{q.median_kl:.4f}",
            f"{q.p99_kl:.3f}",
            f"{q.top1:.1%}",
            f"{q.perplexity:.2f} ({q.reference_perplexity:.2f})",
        )
    return table


if __name__ == "__main__":
    main()
