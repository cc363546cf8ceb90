"""The prompts whose logits every bundle contains as goldens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_export.model.config import GemmaConfig
from gemma_runtime.manifest import LayerCache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JUDGED = 32  # positions at the end of each prompt that become goldens
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
LONG = "long"
# Limit for tokens · parameters of the long prompt, which is run twice: about four minutes each on
# two cores.
_LONG_BUDGET = 2e13


def golden_prompts(
    config: GemmaConfig,
    encoder: "Tokenizer | None",
    context_length: int,
    layouts: Sequence[Sequence[LayerCache]],
) -> dict[str, list[int]]:
    """Token ids by name, bos first; random ids if there is no tokenizer.

    The long prompt is included if one of the layouts has a cache that overwrites old tokens: see
    `long_length`.
    """
    lengths = dict.fromkeys(PROMPTS, min(JUDGED, context_length))
    longest = long_length(config, context_length, layouts)
    if longest:
        lengths[LONG] = longest
    if encoder is None:
        import numpy as np  # here and below: a plan only asks for lengths

        draw, size = np.random.default_rng(0), config.vocab_size
        return {name: draw.integers(0, size, n).tolist() for name, n in lengths.items()}
    texts = {**PROMPTS, LONG: long_text()}
    return {name: _fit(config, encoder, texts[name], size) for name, size in lengths.items()}


def long_length(
    config: GemmaConfig, context_length: int, layouts: Sequence[Sequence[LayerCache]]
) -> int:
    """The length of a prompt that overflows every ring cache before its judged positions.

    0 if there is no ring cache, or if the prompt would take more than four minutes.
    """
    slots = [
        cache.slots
        for layout in layouts
        for cache in layout
        if cache.window is not None and cache.slots < context_length
    ]
    length = min(context_length, max(slots, default=0) + JUDGED)
    return length if slots and length * config.parameters <= _LONG_BUDGET else 0


def long_text() -> str:
    """The words of all prompts, shuffled, because a model would just copy text that repeats."""
    import numpy as np

    words = " ".join(PROMPTS.values()).split(" ")
    shuffle = np.random.default_rng(0)
    return " ".join(words[index] for _ in range(40) for index in shuffle.permutation(len(words)))


def _fit(config: GemmaConfig, encoder: "Tokenizer", text: str, length: int) -> list[int]:
    ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
    repeated = ids * -(-length // len(ids))
    return [config.bos_token, *repeated][:length]
