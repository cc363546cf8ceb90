"""How much each recipe costs, on the shipped artifacts: KL and top-1 to the float32 artifact.

    python benchmarks/quality.py --checkpoint demo --text benchmarks/text.txt

Exports the checkpoint once per recipe, scores the text with each bundle, and compares full
distributions, position by position. A blank line in the text starts a new segment.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import ConsoleReporter
from gemma_export.quantize.recipe import RECIPES, find_recipe
from gemma_runtime.bundle import Bundle
from gemma_runtime.session import open_session
from gemma_runtime.tokenizer import load_tokenizer

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
    reference_perplexity: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("text.txt"))
    parser.add_argument("--recipes", nargs="+", default=_onnx_recipes())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    segments = options.text.read_text("utf-8").split("\n\n")
    with TemporaryDirectory() as folder:
        teacher = _export(options.checkpoint, "none", Path(folder))
        references = [_score(teacher, segment) for segment in segments]
        found = [
            _measure(_export(options.checkpoint, recipe, Path(folder)), references)
            for recipe in options.recipes
        ]
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    else:
        Console().print(_table(found))


def _onnx_recipes() -> list[str]:
    """All but the teacher's own, and the one that ONNX Runtime has no kernel for."""
    return [
        name
        for name, recipe in RECIPES.items()
        if name != "none" and not any(rule.format.per_channel for rule in recipe.rules)
    ]


def _export(checkpoint: str, recipe: str, folder: Path) -> Bundle:
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe(recipe),
        checkpoint=checkpoint,
        context_length=1024,
        output=folder / recipe,
    )
    return export_bundles(request, ConsoleReporter(Console(stderr=True)))[0].bundle


def _score(bundle: Bundle, text: str) -> tuple[list[int], Logits]:
    """The segment's tokens, and the log-probabilities after each of them: (T, V)."""
    tokens = [bundle.manifest.bos_token, *load_tokenizer(bundle).encode(text)][:256]
    return tokens, _run(bundle, tokens)


def _run(bundle: Bundle, tokens: list[int]) -> Logits:
    with open_session(bundle) as session:
        logits = session.score(tokens)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64))
    return logits


def _measure(bundle: Bundle, references: list[tuple[list[int], Logits]]) -> Quality:
    kl, same, ours, theirs = [], [], [], []
    for tokens, want in references:
        got = _run(bundle, tokens)
        kl.append((np.exp(want) * (want - got)).sum(-1, dtype=np.float64))
        same.append(want.argmax(-1) == got.argmax(-1))
        rows = np.arange(len(tokens) - 1)
        ours.append(got[rows, tokens[1:]])
        theirs.append(want[rows, tokens[1:]])
    every = np.concatenate(kl)
    return Quality(
        recipe=bundle.manifest.quantization.recipe,
        bits_per_weight=bundle.manifest.quantization.bits_per_weight,
        artifact_bytes=sum(
            file.bytes for name, file in bundle.manifest.files.items() if "onnx" in name
        ),
        positions=len(every),
        mean_kl=float(every.mean()),
        median_kl=float(np.median(every)),
        p99_kl=float(np.quantile(every, 0.99)),
        top1=float(np.concatenate(same).mean()),
        perplexity=float(np.exp(-np.concatenate(ours).mean())),
        reference_perplexity=float(np.exp(-np.concatenate(theirs).mean())),
    )


def _table(found: list[Quality]) -> Table:
    table = Table(title=f"{found[0].positions} positions, against the float32 artifact")
    headings = ("recipe", "bits", "MB", "mean KL", "median", "p99", "top-1", "perplexity")
    for heading in headings:
        table.add_column(heading)
    for q in found:
        table.add_row(
            q.recipe,
            f"{q.bits_per_weight:.2f}",
            f"{q.artifact_bytes / 1e6:.0f}",
            f"{q.mean_kl:.4f}",
            f"{q.median_kl:.4f}",
            f"{q.p99_kl:.3f}",
            f"{q.top1:.1%}",
            f"{q.perplexity:.2f} ({q.reference_perplexity:.2f})",
        )
    return table


if __name__ == "__main__":
    main()
