"""Runs the reference of an encoder: records goldens, and what quantization costs.

Weights are read by blocks, once for each golden and pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.computing import computing
from gemma_export.model.config import GemmaConfig
from gemma_export.model.decoder import encoder
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchEncoderOps
from gemma_export.progress import Tick
from gemma_export.quantize.store import QuantizedStore
from gemma_runtime.embedding.embedder import Vectors
from gemma_runtime.embedding.verify import EmbeddingGolden, compare_vectors
from gemma_runtime.embedding_bundle import VectorAgreement
from gemma_runtime.errors import CheckpointError

PASSES = 2  # with the float32 weights, and with the quantized ones


@dataclass(frozen=True, slots=True)
class EncoderReference:
    goldens: list[EmbeddingGolden]
    quality: VectorAgreement  # quantized weights against float32 ones


def record_vectors(
    checkpoint: Checkpoint,
    store: QuantizedStore,
    goldens: Mapping[str, list[int]],
    progress: Tick,
    device: torch.device,
) -> EncoderReference:
    """The goldens' vectors, of both kinds of weights. Raises CheckpointError if one overflows."""
    config, shapes = checkpoint.config, checkpoint.config.tensor_shapes()

    def source(name: str) -> SourceWeight:
        return SourceWeight(name, shapes[name], checkpoint)

    with computing(device):
        reference = _evaluate(config, goldens, source, progress, device)
        if not np.isfinite(reference).all():
            raise CheckpointError(
                f"{checkpoint.id} overflows float32: a vector is NaN or Inf; the weights are "
                "damaged, or not those of this config"
            )
        quantized = _evaluate(config, goldens, store.weight, progress, device)
    recorded = [
        EmbeddingGolden(name, tokens, exact.tolist(), rounded.tolist())
        for (name, tokens), exact, rounded in zip(
            goldens.items(), reference, quantized, strict=True
        )
    ]
    return EncoderReference(recorded, compare_vectors(quantized, reference))


def _evaluate(
    config: GemmaConfig,
    goldens: Mapping[str, list[int]],
    weight: Callable[[str], Weight],
    progress: Tick,
    device: torch.device,
) -> Vectors:
    """Vectors, (N, D)."""

    def watched(name: str) -> Weight:
        loaded = weight(name)
        progress(name, prod(loaded.shape) * 4)
        return loaded

    vectors = []
    for tokens in goldens.values():
        ops = TorchEncoderOps(torch.tensor([tokens], device=device), config.rms_norm_eps)
        with torch.inference_mode():
            vectors.append(encoder(ops, config, watched)[0].cpu().numpy())
    return np.stack(vectors)
