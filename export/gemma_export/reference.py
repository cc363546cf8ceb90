"""What the reference says: goldens, and how far the quantized weights are from the float ones.

Both passes stream every weight once, block by block, so a 27b needs no whole model in memory.
B prompts, T tokens each, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.config import GemmaConfig
from gemma_export.decoder import decoder
from gemma_export.ops import Weight
from gemma_export.quantize.store import QuantizedStore
from gemma_export.torch_ops import TorchOps
from gemma_runtime.agreement import compare_logits, pool
from gemma_runtime.goldens import Golden, top_logits
from gemma_runtime.manifest import Agreement, Headroom

PROMPT_TOKENS = 32  # of each golden: 4 prompts are 128 positions
PROMPTS: Mapping[str, str] = {
    "prose": "The lighthouse keeper wrote every evening, in the same grey notebook, how far the "
    "light had reached through the fog and which ships had answered it before midnight.",
    "languages": "Guten Morgen! Le train part à huit heures. 東京は今日も雨です。Сегодня хорошая "
    "погода. صباح الخير. ¿Dónde está la biblioteca? 오늘은 금요일입니다.",
    "code": "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n    middle = "
    'len(ordered) // 2\n    if len(ordered) % 2:\n        return ordered[middle]\n    return "',
    "copy": 'Order 20330110-7741, 2033-01-10, EUR 1,204.50. JSON: {"order": "20330110-7741", '
    '"date": "2033-01-10", "amount": 1204.50}. Again: {"order": "20330110-7741", "date": "2033-',
}


@dataclass(frozen=True, slots=True)
class Reference:
    goldens: list[Golden]
    quality: Agreement  # quantized weights against float32 weights
    headroom: Headroom


def record_reference(
    checkpoint: Checkpoint,
    store: QuantizedStore,
    prompts: Mapping[str, list[int]],
    progress: Callable[[str, int], None],
) -> Reference:
    """Run prompts of equal length with the float weights and with the store's."""
    config, shapes = checkpoint.config, checkpoint.config.tensor_shapes()
    tokens = torch.tensor(list(prompts.values()))  # (B, T)

    def source(name: str) -> Weight:
        return SourceWeight(name, shapes[name], checkpoint)

    exact, peak = _evaluate(config, tokens, source, progress)
    tops = [top_logits(logits) for logits in exact]
    del exact  # B · T · V floats: one such array at a time
    rounded, _ = _evaluate(config, tokens, store.weight, progress)
    goldens = [
        Golden(name, prompt, top, top_logits(logits))
        for (name, prompt), top, logits in zip(prompts.items(), tops, rounded, strict=True)
    ]
    quality = pool([compare_logits(*pair) for pair in zip(rounded, tops, strict=True)])
    return Reference(goldens, quality, Headroom(max_abs=peak, factor=1.0))


def golden_prompts(
    config: GemmaConfig, encoder: Tokenizer | None, context_length: int
) -> dict[str, list[int]]:
    """Prompts of equal length, bos first; random ids where there is no tokenizer."""
    length = min(PROMPT_TOKENS, context_length)
    if encoder is None:
        draw = np.random.default_rng(0).integers(0, config.vocab_size, (len(PROMPTS), length))
        return dict(zip(PROMPTS, draw.tolist(), strict=True))
    return {name: _fit(config, encoder, text, length) for name, text in PROMPTS.items()}


def _fit(config: GemmaConfig, encoder: Tokenizer, text: str, length: int) -> list[int]:
    ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
    repeated = ids * -(-length // len(ids))
    return [config.bos_token, *repeated][:length]


def _evaluate(
    config: GemmaConfig,
    tokens: Tensor,
    weight: Callable[[str], Weight],
    progress: Callable[[str, int], None],
) -> tuple[NDArray[np.float32], float]:
    """Logits (B, T, V) and the largest residual."""

    def watched(name: str) -> Weight:
        found = weight(name)
        progress(name, int(np.prod(found.shape)) * 4)
        return found

    ops = TorchOps(tokens, config.rms_norm_eps)
    with torch.inference_mode():
        logits = decoder(ops, config, watched)
    return logits.numpy(), ops.max_abs
