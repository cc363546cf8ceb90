"""Calibrated rounding of a Gemma 2 that has learned something, where no real one is at hand.

    python benchmarks/trained_gemma2.py --steps 800 --json

Trains a small Gemma 2 (1.5 million weights; softcaps, interleaved windows) on the bytes of the
default calibration text, rounds it by every int4 recipe for that same text, and compares its
distributions with its own float ones on text that neither saw (`benchmarks/text.txt`).
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.decoder import decoder
from gemma_export.progress import QuietReporter
from gemma_export.quantize.calibrate.text import Calibration, default_texts
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store

_RECIPES = ("int4", "int4-gptq", "int4-distilled")
_BYTES, _BOS = 256, 256
_LENGTH, _BATCH = 128, 16
_CALIBRATED = 128  # sequences
_RATE = 3e-3
_CONFIG = Gemma2Config(
    vocab_size=_BYTES + 32,
    bos_token_id=_BOS,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=64,
    dtype="float32",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    recipe: str
    positions: int
    mean_kl: float  # nats, to the float model
    top1: float
    bits_per_byte: float
    reference_bits_per_byte: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    learned = _sequences("\n\n".join(default_texts()))
    unseen = _sequences(Path(__file__).with_name("text.txt").read_text("utf-8"))
    console = Console(stderr=True)
    with TemporaryDirectory() as folder:
        train(learned, options.steps, Path(folder), console.print)
        checkpoint = open_checkpoint(folder)
        order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(0))
        calibration = Calibration("default, as bytes", learned[order[:_CALIBRATED]])
        found = [compare(checkpoint, recipe, calibration, unseen) for recipe in _RECIPES]
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    else:
        Console().print(_table(found))


def train(sequences: Tensor, steps: int, folder: Path, say: Callable[[str], None]) -> None:
    """Adam with a falling rate; saves the model as an ordinary checkpoint folder."""
    model = Gemma2ForCausalLM(_CONFIG)
    model.set_attn_implementation("eager")  # sdpa drops the softcap
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for step in range(1, steps + 1):
        batch = sequences[torch.randint(len(sequences), (_BATCH,))]
        logits = model(batch[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            say(f"step {step}: {loss.item() / math.log(2):.2f} bits per byte")
    model.save_pretrained(folder)


def compare(
    checkpoint: Checkpoint, recipe: str, calibration: Calibration, unseen: Tensor
) -> Outcome:
    chosen, shapes = find_recipe(recipe), checkpoint.config.tensor_shapes()
    rounded = CalibratedWeights(Workspace(checkpoint, chosen, calibration), QuietReporter().stage)
    store = open_or_build_store(checkpoint, chosen, None, rounded if chosen.is_calibrated else None)
    exact = {name: checkpoint.rows(name, 0, shape[0]) for name, shape in shapes.items()}
    stored = {name: store.weight(name).rows(0, shape[0]) for name, shape in shapes.items()}
    want, got = (_log_likely(checkpoint, weights, unseen) for weights in (exact, stored))
    return Outcome(
        recipe=recipe,
        positions=want.shape[0] * want.shape[1],
        mean_kl=float((want.exp() * (want - got)).sum(-1).mean()),
        top1=float((want.argmax(-1) == got.argmax(-1)).float().mean()),
        bits_per_byte=_bits(got, unseen),
        reference_bits_per_byte=_bits(want, unseen),
    )


def _log_likely(checkpoint: Checkpoint, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    config = checkpoint.config
    with torch.inference_mode():
        ops = BatchOps(tokens, config.rms_norm_eps)
        return decoder(ops, config, hold(weights).__getitem__).log_softmax(-1)


def _bits(likely: Tensor, tokens: Tensor) -> float:
    """Per byte, of the tokens as they go on."""
    return float(-likely[:, :-1].gather(-1, tokens[:, 1:, None]).mean() / math.log(2))


def _sequences(text: str) -> Tensor:
    """(B, T), each beginning with bos."""
    ids = torch.tensor(list(text.encode()))
    rows = len(ids) // (_LENGTH - 1)
    body = ids[: rows * (_LENGTH - 1)].view(rows, -1)
    return torch.cat((torch.full((rows, 1), _BOS), body), 1)


def _table(found: list[Outcome]) -> Table:
    table = Table(title=f"{found[0].positions} positions of unseen text")
    for heading in ("recipe", "mean KL", "top-1", "bits per byte (float)"):
        table.add_column(heading)
    for outcome in found:
        table.add_row(
            outcome.recipe,
            f"{outcome.mean_kl:.4f}",
            f"{outcome.top1:.1%}",
            f"{outcome.bits_per_byte:.3f} ({outcome.reference_bits_per_byte:.3f})",
        )
    return table


if __name__ == "__main__":
    main()
