"""Refuses configs of models that are neither causal Gemma text models nor EmbeddingGemmas."""

from collections.abc import Iterator, Mapping
from typing import NoReturn

from gemma_export.model.families import ENCODERS, FAMILIES
from gemma_export.model.official import Json
from gemma_runtime.errors import ConfigError

_CONFIGS = (
    "GemmaConfig",
    "VaultGemmaConfig",
    "Gemma2Config",
    "Gemma3TextConfig",
    "Gemma3Config",
    "Gemma4TextConfig",
    "Gemma4Config",
    "Gemma4UnifiedTextConfig",
    "Gemma4UnifiedConfig",
)
_ENCODER_CONFIGS = ("Gemma3TextConfig", "EmbeddingGemma2TextConfig", "EmbeddingGemma2Config")
_CLASSES = tuple(name for family in FAMILIES.values() for name in family.classes)
_ENCODER_CLASSES = tuple(name for family in ENCODERS.values() for name in family.classes)
BIDIRECTIONAL = "use_bidirectional_attention"
_IMAGES_ONLY = "vision"  # tokens of an image attend to each other; text stays causal
_CODE = ("AutoConfig", "AutoModel")  # keys of auto_map that change what the weights compute
# The documentation's table.
REFUSED: Mapping[str, str] = {
    "classifiers and reward models, by `architectures`": "neither causal language models nor "
    "EmbeddingGemmas",
    f"`bidirectional`, `is_causal: false`, and `{BIDIRECTIONAL}` in families other than Gemma 3": (
        "they attend to later tokens"
    ),
    "a Gemma inside another model, e.g. PaliGemma, ShieldGemma 2, ColGemma": "its text model is "
    "used in another way",
    "`auto_map` with code of its own": "code of a checkpoint is never run",
}


def check_attention(config: Json, text: Json, *, is_encoder: bool) -> None:
    """Raise ConfigError for other classes, own code, and attention to later tokens.

    An encoder's tokens attend to later ones.
    """
    classes = config.get("architectures") or []
    known, what = (
        (_ENCODER_CLASSES, "an encoder") if is_encoder else (_CLASSES, "a causal language model")
    )
    if not isinstance(classes, list) or (classes and not set(map(str, classes)) & set(known)):
        _refuse("architectures", classes, f"{what}: {', '.join(known)}")
    configs = _ENCODER_CONFIGS if is_encoder else _CONFIGS
    for key, name in _own_code(config):
        if name not in (*known, *configs):
            _refuse(f"auto_map {key}", name, "no code of its own, which is never run")
    if is_encoder:
        return
    for level in (config, text):
        for key in (BIDIRECTIONAL, "bidirectional"):
            if level.get(key) and level[key] != _IMAGES_ONLY:
                _refuse(key, level[key], "false: a causal language model")
        if level.get("is_causal") is False:
            _refuse("is_causal", False, "true: a causal language model")


def _own_code(config: Json) -> Iterator[tuple[str, str]]:
    """Key and class of each entry of `auto_map`, e.g. AutoModel and BidirectionalGemma."""
    entries = config.get("auto_map")
    for key, value in entries.items() if isinstance(entries, Mapping) else ():
        if str(key).startswith(_CODE):
            yield str(key), str(value).rpartition(".")[2]


def _refuse(key: str, found: object, expected: str) -> NoReturn:
    raise ConfigError(f"config: {key} is {found!r:.120}, expected {expected}")
