"""Runs the reference: records goldens, and compares quantized weights with the float ones.

Each of the two passes reads every weight once, by blocks, so a 27b never is in memory as a whole.
With int8 caches there are three: the quantized weights also run with float caches.
Activations are on the device, and blocks of weights are moved there.
B prompts, T tokens each, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.computing import CPU, computing
from gemma_export.model.config import GemmaConfig
from gemma_export.model.decoder import decoder
from gemma_export.model.int8_cache import LayerScales
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchOps
from gemma_export.progress import Tick
from gemma_export.quantize.store import QuantizedStore
from gemma_export.sidecars.prompts import JUDGED
from gemma_runtime.errors import CheckpointError
from gemma_runtime.manifest import Agreement, Headroom
from gemma_runtime.proof.agreement import compare_logits, pool
from gemma_runtime.proof.goldens import Golden, TopLogits, top_logits


@dataclass(frozen=True, slots=True)
class Reference:
    goldens: list[Golden]
    quality: Agreement  # quantized weights, and caches, against float32 ones
    headroom: Headroom
    max_products: Mapping[str, float]  # the largest |x| that a matrix takes or gives, by its name
    cache_quality: Agreement | None  # int8 caches against float ones, both with quantized weights


def record_reference(
    checkpoint: Checkpoint,
    store: QuantizedStore,
    prompts: Mapping[str, list[int]],
    scales: Sequence[LayerScales] | None,
    progress: Tick,
    device: torch.device = CPU,
) -> Reference:
    """Run all prompts with the float weights and with the store's; batch prompts of one length.

    `scales` are those of int8 caches, which the store's weights then run with.
    """
    lengths = sorted({len(prompt) for prompt in prompts.values()})
    together = [{n: p for n, p in prompts.items() if len(p) == length} for length in lengths]
    with computing(device):
        parts = [_record(checkpoint, store, equal, scales, progress, device) for equal in together]
    peak = max(part.headroom.max_abs for part in parts)
    caches = [part.cache_quality for part in parts if part.cache_quality is not None]
    return Reference(
        goldens=[golden for part in parts for golden in part.goldens],
        quality=pool([part.quality for part in parts]),
        headroom=Headroom(max_abs=peak, factor=1.0),
        max_products={
            name: max(part.max_products[name] for part in parts) for name in parts[0].max_products
        },
        cache_quality=pool(caches) if caches else None,
    )


def passes(scales: Sequence[LayerScales] | None) -> int:
    """How often the weights are read for prompts of one length."""
    return 2 if scales is None else 3


def _record(
    checkpoint: Checkpoint,
    store: QuantizedStore,
    prompts: Mapping[str, list[int]],
    scales: Sequence[LayerScales] | None,
    progress: Tick,
    device: torch.device,
) -> Reference:
    config, shapes = checkpoint.config, checkpoint.config.tensor_shapes()
    tokens = torch.tensor(list(prompts.values())).to(device)  # (B, T)

    def source(name: str) -> Weight:
        return SourceWeight(name, shapes[name], checkpoint)

    exact, ops = _evaluate(config, tokens, source, progress)
    if not np.isfinite(exact).all():
        raise CheckpointError(
            f"{checkpoint.id}: its float32 weights give logits that are NaN or Inf; a weight is "
            "too large for any computation, so the checkpoint is damaged"
        )
    tops = [top_logits(logits) for logits in exact]
    del exact  # B · JUDGED · V floats: keep only one such array
    rounded, _ = _evaluate(config, tokens, store.weight, progress)
    cache_quality = None
    if scales is not None:
        with_floats = [top_logits(logits) for logits in rounded]
        del rounded
        rounded, _ = _evaluate(config, tokens, store.weight, progress, scales)
        cache_quality = _compare(rounded, with_floats)
    goldens = [
        Golden(name, prompt, top, top_logits(logits), compare_logits(logits, top))
        for (name, prompt), top, logits in zip(prompts.items(), tops, rounded, strict=True)
    ]
    headroom = Headroom(max_abs=ops.max_abs, factor=1.0)
    quality = pool([golden.quality for golden in goldens if golden.quality is not None])
    return Reference(goldens, quality, headroom, ops.max_products, cache_quality)


def _compare(logits: NDArray[np.float32], expected: Sequence[TopLogits]) -> Agreement:
    return pool([compare_logits(*pair) for pair in zip(logits, expected, strict=True)])


def _evaluate(
    config: GemmaConfig,
    tokens: Tensor,
    weight: Callable[[str], Weight],
    progress: Tick,
    scales: Sequence[LayerScales] | None = None,
) -> tuple[NDArray[np.float32], TorchOps]:
    """Logits, (B, JUDGED, V), and the operations, which measured the largest values."""

    def watched(name: str) -> Weight:
        loaded = weight(name)
        progress(name, int(np.prod(loaded.shape)) * 4)
        return loaded

    ops = TorchOps(tokens, config.rms_norm_eps, JUDGED, scales)
    with torch.inference_mode():
        logits = decoder(ops, config, watched)
    return logits.cpu().numpy(), ops
