"""Finds the text model among a folder's tensors, whatever its names begin with."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gemma_export.model.config import HEAD
from gemma_runtime.errors import CheckpointError

# Every layer of a Gemma has one of these norms. Of the towers, only Gemma 4's have them too.
_LAYER = re.compile(
    r"((?:.*\.)?)layers\.\d+\.(?:pre_feedforward|post_feedforward|post_attention)_layernorm\.weight"
)
# What transformers writes and reads; other beginnings come from wrappers, e.g. `module.`.
_NATIVE = ("model.", "", "model.language_model.", "language_model.model.")
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|base_layer\.|modules_to_save\.)")
_PACKED = re.compile(
    r"\.(?:qweight|qzeros|scales|g_idx|SCB|weight\.absmax|weight_scale|weight_scale_inv|"
    r"weight_packed|weight_zero_point)$"
)
_OTHERS = (
    "vision_tower.",
    "audio_tower.",
    "multi_modal_projector.",
    "embed_vision.",
    "embed_audio.",
)
_BUFFERS = (".inv_freq", ".position_ids")  # computed from the config, never trained
# The documentation's tables.
NAMES: Mapping[str, str] = {
    f"names that begin with {', '.join(f'`{name}`' for name in _NATIVE if name)} or with nothing": (
        "the text model"
    ),
    "names with any other beginning, e.g. `module.`": "the text model, if there is only one",
    f"`{HEAD}`": "the embedding table if it equals it, or if there is no table; else a head of its "
    "own, whatever `tie_word_embeddings` says",
    "towers for images and sound, value heads, other tensors": "left out; a note counts them",
}
REFUSED: Mapping[str, str] = {
    "`tie_word_embeddings: false` without a head": "its weights are missing",
    "two text models in one folder": "it is not clear which one is meant",
    "tensors of an adapter among those of the model": "merge it first, or give it as `--adapter`",
    "packed tensors without a quantization in `config.json`": "their format is not known",
}


@dataclass(frozen=True, slots=True)
class TextNames:
    stored: Mapping[str, str]  # our name → stored name
    towers: int  # number of tensors for images and sound
    others: tuple[str, ...]  # stored names of tensors that transformers ignores too


def find_text(names: Iterable[str], expected: Mapping[str, str]) -> TextNames:
    """Our names of the tensors that the text model needs, their packed parts, and its head.

    `expected` maps Hugging Face's names of the model's tensors to ours.

    Raises CheckpointError for unmerged adapters, and for two text models.
    """
    names = list(names)
    prefix = _text_prefix(names)
    stored: dict[str, str] = {}
    towers, others = 0, []
    for name in names:
        known = _hf_name(name, prefix)
        if _is_part(known, expected):
            _add(stored, expected.get(known, known), name)
        elif _ADAPTER.search(name):
            raise CheckpointError(
                f"tensor {name} is part of an adapter that is not merged; merge it into the model"
            )
        elif _is_of_tower(name):
            towers += 1
        elif not name.endswith(_BUFFERS):
            others.append(name)
    return TextNames(stored, towers, tuple(others))


def check_unpacked(stored: Iterable[str]) -> None:
    """Raise CheckpointError if a part of a quantized matrix is left over."""
    for name in stored:
        if _PACKED.search(name):
            raise CheckpointError(
                f"tensor {name} is part of a quantized matrix, but config.json does not say how "
                "it is quantized; give the original checkpoint"
            )


def _text_prefix(names: Iterable[str]) -> str:
    matches = (_LAYER.fullmatch(name) for name in names if not _is_of_tower(name))
    found = {match[1] for match in matches if match}
    chosen = sorted(found & set(_NATIVE) or found)
    if len(chosen) > 1:
        raise CheckpointError(
            f"two text models, with tensors named {chosen[0]}layers.… and {chosen[1]}layers.…; "
            "expected one"
        )
    return chosen[0] if chosen else "model."


def _is_of_tower(name: str) -> bool:
    return any(f".{tower}" in f".{name}" for tower in _OTHERS)


def _hf_name(name: str, prefix: str) -> str:
    """`model.…` for the text model's tensors, `lm_head.…` for its head."""
    if head := re.search(r"(?:^|\.)(lm_head\..+)", name):
        return head[1]
    return "model." + name.removeprefix(prefix) if name.startswith(prefix) else name


def _is_part(name: str, expected: Collection[str]) -> bool:
    """Whether a tensor is a weight, or a part of a packed one: `x.qweight`, `x.weight.absmax`."""
    if name in expected or (name.startswith("lm_head.") and name != "lm_head.bias"):
        return True
    module, weight, _ = name.partition(".weight.")
    return f"{module}.weight" in expected if weight else _packed_part(name, expected)


def _packed_part(name: str, expected: Collection[str]) -> bool:
    module, _, part = name.rpartition(".")
    return f"{module}.weight" in expected and part not in ("bias",)


def _add(stored: dict[str, str], ours: str, name: str) -> None:
    if ours in stored:
        raise CheckpointError(f"tensors {stored[ours]} and {name} are both {ours}; keep one")
    stored[ours] = name
