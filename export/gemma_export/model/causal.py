"""Refuses configs of models that are not causal Gemma text models."""

from collections.abc import Iterator, Mapping
from typing import NoReturn

from gemma_export.model.families import FAMILIES
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
_CLASSES = tuple(name for family in FAMILIES.values() for name in family.classes)
_IMAGES_ONLY = "vision"  # tokens of an image attend to each other; text stays causal
_CODE = ("AutoConfig", "AutoModel")  # keys of auto_map that change what the weights compute
# The documentation's table.
REFUSED: Mapping[str, str] = {
    "classifiers, reward and embedding models, by `architectures`": "not causal language models",
    "`use_bidirectional_attention`, `bidirectional`, `is_causal: false`": "they attend to later "
    "tokens",
    "a Gemma inside another model, e.g. PaliGemma, ShieldGemma 2, ColGemma": "its text model is "
    "used in another way",
    "`auto_map` with code of its own": "code of a checkpoint is never run",
}


def check_causal(config: Json, text: Json) -> None:
    """Raise ConfigError for other classes, own code, and attention to later tokens."""
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or (classes and not set(map(str, classes)) & set(_CLASSES)):
        _refuse("architectures", classes, f"a causal language model: {', '.join(_CLASSES)}")
    for key, name in _own_code(config):
        if name not in (*_CLASSES, *_CONFIGS):
            _refuse(f"auto_map {key}", name, "no code of its own, which is never run")
    for level in (config, text):
        for key in ("use_bidirectional_attention", "bidirectional"):
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
