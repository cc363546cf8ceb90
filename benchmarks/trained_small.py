"""Measures calibrated rounding on a small trained model, without downloading a real one.

    python benchmarks/trained_small.py --family gemma2 --steps 800 --json

Trains a Gemma 2 (1.5 million weights; softcaps, interleaved windows) or a Gemma 4 like E2B (1.5
million; per-layer embeddings, shared caches, double-wide layers, layer scalars) on the bytes of the
default calibration text, and quantizes it with each recipe, calibrated on the same text. Then
compares the quantized model with the float model on unseen text (`benchmarks/text.txt`).

A recipe may have a budget: `int4-gptq:6` means `--quant int4-gptq --bits 6`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.model.batch_ops import BatchOps, HeldWeight, hold
from gemma_export.model.config import TABLE
from gemma_export.model.decoder import decoder
from gemma_export.model.ops import Weight
from gemma_export.progress import QuietReporter
from gemma_export.quantize.calibrate.budget import Budget, spend_budget
from gemma_export.quantize.calibrate.text import Calibration, default_texts
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.recipe import Recipe, bits_per_weight, find_recipe
from gemma_export.quantize.store import open_or_build_store

_RECIPES = (
    *(
        f"{base}{rounding}"
        for base in ("int4", "int4-g64", "int4-g128", "int4-asym", "mixed")
        for rounding in ("", "-gptq", "-distilled")
    ),
    "int4:6",
    "int4-gptq:6",
    "int8",
    "int8-smooth",
)
_BYTES, _BOS = 256, 256
_LENGTH = 128
_CALIBRATION_SEQUENCES = 128
_RATE = 3e-3
_SHARED: dict[str, Any] = {
    "vocab_size": _BYTES + 32,
    "bos_token_id": _BOS,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 32,
    "sliding_window": 64,
    "dtype": "float32",
}


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            intermediate_size=512, num_key_value_heads=2, query_pre_attn_scalar=32, **_SHARED
        )
    )


def _gemma4() -> PreTrainedModel:
    """Like E2B: two layers read the caches of earlier ones."""
    settings: dict[str, Any] = {
        "intermediate_size": 256,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "global_head_dim": 64,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": _BYTES + 32,
        "final_logit_softcapping": 30.0,
    }
    model = Gemma4ForCausalLM(Gemma4TextConfig(**settings, **_SHARED))
    scalars = (factor for name, factor in model.named_buffers() if name.endswith("layer_scalar"))
    for factor in scalars:  # not trained
        factor.fill_(0.4 + 0.5 * torch.rand(()))
    return model


_FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {"gemma2": _gemma2, "gemma4": _gemma4}


@dataclass(frozen=True, slots=True)
class Outcome:
    recipe: str
    bits_per_weight: float
    positions: int
    mean_kl: float  # nats, relative to the float model
    mean_kl_int8_inputs: float  # with inputs of products rounded to int8, as onnxruntime does
    top1: float
    bits_per_byte: float
    reference_bits_per_byte: float  # of the float model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=_FAMILIES, default="gemma2")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--model", type=Path, help="keep the trained model here, and use it again")
    parser.add_argument("--recipes", nargs="+", default=_RECIPES)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    training = _sequences("\n\n".join(default_texts()))
    unseen = _sequences(Path(__file__).with_name("text.txt").read_text("utf-8"))
    console = Console(stderr=True)
    with TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary)
        if not (folder / "config.json").exists():
            model = _FAMILIES[options.family]()
            train(model, training, options.steps, options.batch, console.print)
            model.save_pretrained(folder)
        checkpoint = open_checkpoint(str(folder))
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
        calibration = Calibration("default, as bytes", training[order[:_CALIBRATION_SEQUENCES]])
        outcomes = []
        for recipe in options.recipes:
            outcomes.append(compare(checkpoint, recipe, calibration, unseen))
            console.print(outcomes[-1])
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(outcomes) + b"\n")
    else:
        Console().print(_table(outcomes))


def train(
    model: PreTrainedModel,
    sequences: Tensor,
    steps: int,
    batch: int,
    say: Callable[[str], None],
) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    model.set_attn_implementation("eager")  # sdpa ignores the softcap
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = sequences[torch.randint(len(sequences), (batch,))]
        logits = model(chosen[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            say(f"step {step}: {loss.item() / math.log(2):.2f} bits per byte")


def compare(
    checkpoint: Checkpoint, recipe: str, calibration: Calibration, unseen: Tensor
) -> Outcome:
    chosen, shapes = _recipe(recipe, checkpoint, calibration), checkpoint.config.tensor_shapes()
    rounded = CalibratedWeights(Workspace(checkpoint, chosen, calibration), QuietReporter().stage)
    store = open_or_build_store(checkpoint, chosen, None, rounded if chosen.is_calibrated else None)
    exact = hold({name: checkpoint.rows(name, 0, shape[0]) for name, shape in shapes.items()})
    stored = hold({name: store.weight(name).rows(0, shape[0]) for name, shape in shapes.items()})
    stored[TABLE] = replace(stored[TABLE], factors=store.weight(TABLE).factors)
    reference = _log_probs(BatchOps, checkpoint, exact, unseen)
    quantized = _log_probs(BatchOps, checkpoint, stored, unseen)
    rounding = _log_probs(_RoundingOps, checkpoint, stored, unseen)
    return Outcome(
        recipe=recipe,
        bits_per_weight=bits_per_weight(checkpoint.config, chosen.formats(checkpoint.config)),
        positions=reference.shape[0] * reference.shape[1],
        mean_kl=_mean_kl(reference, quantized),
        mean_kl_int8_inputs=_mean_kl(reference, rounding),
        top1=float((reference.argmax(-1) == quantized.argmax(-1)).float().mean()),
        bits_per_byte=_bits(quantized, unseen),
        reference_bits_per_byte=_bits(reference, unseen),
    )


def _recipe(name: str, checkpoint: Checkpoint, calibration: Calibration) -> Recipe:
    base, _, bits = name.partition(":")
    recipe = find_recipe(base)
    if not bits:
        return recipe
    stage = QuietReporter().stage
    budget = Budget(recipe, float(bits))
    return spend_budget(budget, checkpoint, calibration, stage, splits_table=True)


class _RoundingOps(BatchOps):
    """Rounds the inputs of products to int8 in groups of 32."""

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        return super().project(_rounded(x), weights)

    def logits(self, x: Tensor, head: Weight, softcap: float | None) -> Tensor:
        return super().logits(_rounded(x), head, softcap)


def _rounded(x: Tensor) -> Tensor:
    groups = x.view(*x.shape[:-1], -1, 32)
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return ((groups / steps).round() * steps).flatten(-2)


def _mean_kl(reference: Tensor, other: Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def _log_probs(
    kind: type[BatchOps],
    checkpoint: Checkpoint,
    weights: dict[str, HeldWeight],
    tokens: Tensor,
) -> Tensor:
    """(B, T, V)"""
    config = checkpoint.config
    with torch.inference_mode():
        ops = kind(tokens, config.rms_norm_eps)
        return decoder(ops, config, weights.__getitem__).log_softmax(-1)


def _bits(log_probs: Tensor, tokens: Tensor) -> float:
    """Mean bits per byte: the cross-entropy of each next token."""
    return float(-log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).mean() / math.log(2))


def _sequences(text: str) -> Tensor:
    """The text's bytes in rows that each begin with bos: (B, T)."""
    ids = torch.tensor(list(text.encode()))
    rows = len(ids) // (_LENGTH - 1)
    body = ids[: rows * (_LENGTH - 1)].view(rows, -1)
    return torch.cat((torch.full((rows, 1), _BOS), body), 1)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title=f"{outcomes[0].positions} positions of unseen text")
    for heading in (
        "recipe",
        "bits per weight",
        "mean KL",
        "with int8 inputs",
        "top-1",
        "bits per byte (float)",
    ):
        table.add_column(heading)
    for outcome in outcomes:
        table.add_row(
            outcome.recipe,
            f"{outcome.bits_per_weight:.2f}",
            f"{outcome.mean_kl:.5f}",
            f"{outcome.mean_kl_int8_inputs:.5f}",
            f"{outcome.top1:.1%}",
            f"{outcome.bits_per_byte:.3f} ({outcome.reference_bits_per_byte:.3f})",
        )
    return table


if __name__ == "__main__":
    main()
