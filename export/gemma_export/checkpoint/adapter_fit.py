"""Finds which weights of a model an adapter changes, and how, without torch.

Names in the adapter's file are `base_model.model.MODULE.PART`, with or without the adapter's own
name, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_export.checkpoint.adapter_folder import ADAPTER_CONFIG, Adapter
from gemma_export.formats.patterns import matches
from gemma_export.model.config import HEAD, TABLE, GemmaConfig
from gemma_runtime.errors import CheckpointError

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COMPARED = 1 << 24  # bytes at a time
_PREFIX = re.compile(r"^(module\.)?(base_model\.(model\.)?)*")
_MULTIMODAL = re.compile(r"^(model\.)?language_model\.(model\.)?")
_VISION = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|base_layer|modules_to_save|original_module|token_adapter)"
    r"(\.(?P<rest>.+))?"
)
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one weight; its tensors by their names in the file.

    Linear: weight (N, K) + scale · B (N, r) @ A (r, K), then with a magnitude (N,) each row gets
    that norm. Embedding: table (V, M) + scale · (B (M, r) @ A (r, V)) transposed, and a magnitude
    (M,) is the norm of each column.
    """

    down: str | None = None  # A
    up: str | None = None  # B
    scale: float = 0.0
    magnitude: str | None = None
    is_embedding: bool = False
    whole: str | None = None  # replaces the weight, before anything is added
    some: str | None = None  # replaces the rows of `tokens`
    tokens: tuple[int, ...] = ()

    @property
    def is_replacement(self) -> bool:
        return self.down is None


def merged_config(config: GemmaConfig, changed: Iterable[str]) -> GemmaConfig:
    """The config of the merged model, given the names of the weights that adapters change."""
    return replace(config, tied=config.tied and HEAD not in set(changed))


def fit_adapter(
    adapter: Adapter, config: GemmaConfig
) -> tuple[Mapping[str, tuple[Change, ...]], tuple[str, ...]]:
    """The changes by weight, and notes. Raises CheckpointError if they don't fit this model.

    Changes of `HEAD` in a model whose head is its table give it a head of its own.
    """
    shapes = {**config.tensor_shapes()}
    shapes.setdefault(HEAD, shapes[TABLE])
    names = {config.hf_name(name): name for name in shapes}
    changes: dict[str, tuple[Change, ...]] = {}
    parts, vision = _parts(adapter)
    for module, stored in parts.items():
        name = _weight_name(module, names)
        if name is None:
            raise CheckpointError(
                f"{adapter.path} changes {module}, which the base model doesn't have; "
                f"{_trained_on(adapter)}"
            )
        if name in changes:
            raise CheckpointError(f"{adapter.path} changes {name} twice; save the adapter again")
        changes[name] = (_change(adapter, module, stored, shapes[name]),)
    if not changes:
        raise CheckpointError(f"{adapter.path} has no LoRA tensors of a text model")
    notes: tuple[str, ...] = ()
    if vision:
        notes = (
            f"adapter {adapter.name} is merged into the text model only, without its vision "
            f"tensors ({vision})",
        )
    return _tied(adapter, changes, notes) if config.tied else (changes, notes)


def _parts(adapter: Adapter) -> tuple[dict[str, dict[str, str]], int]:
    """Module → part → stored name, and the number of vision tensors left out."""
    parts: dict[str, dict[str, str]] = {}
    vision = 0
    for stored, info in adapter.tensors.items():
        name = _PREFIX.sub("", _WRAPPERS.sub("", stored), count=1)
        if _VISION.search(name):
            vision += 1
            continue
        module, part, rest = _split(name)
        if rest.endswith("bias"):
            raise CheckpointError(
                f"{adapter.path}: {stored} is a bias, but Gemma's layers have no biases"
            )
        if info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{adapter.path}: tensor {stored} is {info.dtype}, expected one of "
                f"{', '.join(_FLOATS)}"
            )
        known = parts.setdefault(module, {})
        if part in known:
            raise CheckpointError(
                f"{adapter.path} has both {known[part]} and {stored}: two adapters in one file; "
                "save each in a folder of its own"
            )
        known[part] = stored
    return {module: found for module, found in parts.items() if set(found) != {""}}, vision


def _split(name: str) -> tuple[str, str, str]:
    """`MODULE.lora_A.default.weight` → (MODULE, lora_A, default.weight)."""
    if (match := _PART.fullmatch(name)) is None:
        module, _, rest = name.rpartition(".")
        return module, "whole", rest
    part = match["part"]
    # The original lies beside its trained copy; a merge doesn't need it.
    kept = {"modules_to_save": "whole", "original_module": ""}.get(part, part)
    return match["module"], kept, match["rest"] or ""


def _weight_name(module: str, names: Mapping[str, str]) -> str | None:
    """Our name of a module's weight; `names` has it by Hugging Face's name."""
    name = f"{_MULTIMODAL.sub('model.', module)}.weight"
    if name.removeprefix("model.") == HEAD:
        return HEAD
    return names.get(name) or names.get(f"model.{name}")


def _change(
    adapter: Adapter, module: str, parts: Mapping[str, str], shape: tuple[int, ...]
) -> Change:
    if "whole" in parts or "token_adapter" in parts:
        return _replacement(adapter, module, parts, shape)
    is_embedding = any(part in parts for part in _EMBEDDING)
    down, up = _EMBEDDING if is_embedding else ("lora_A", "lora_B")
    for part in (down, up):
        if part not in parts:
            raise CheckpointError(f"{adapter.path}: {module} has no {part}; save the adapter again")
    rank, scale = _rank_and_scale(adapter, module)
    outputs, inputs = (shape[1], shape[0]) if is_embedding else (shape[0], shape[-1])
    magnitude = parts.get("lora_magnitude_vector")
    if adapter.config.get("use_dora") and magnitude is None:
        raise CheckpointError(
            f"{adapter.path}: {module} has no lora_magnitude_vector, but use_dora is true"
        )
    _check_shape(adapter, parts[down], (rank, inputs))
    _check_shape(adapter, parts[up], (outputs, rank))
    if magnitude is not None:
        _check_shape(adapter, magnitude, (outputs,))
    if (base := parts.get("base_layer")) is not None:
        _check_shape(adapter, base, shape)
    return Change(parts[down], parts[up], scale, magnitude, is_embedding, base)


def _replacement(
    adapter: Adapter, module: str, parts: Mapping[str, str], shape: tuple[int, ...]
) -> Change:
    if adapter.weight != 1:
        raise CheckpointError(
            f"adapter {adapter.name} replaces values of {module}, so it can't have the weight "
            f"{adapter.weight:g}; leave the weight out"
        )
    if (whole := parts.get("whole")) is not None:
        _check_shape(adapter, whole, shape)
        return Change(whole=whole)
    found = adapter.config.get("trainable_token_indices")
    if isinstance(found, Mapping):
        named = (ids for name, ids in found.items() if f".{module}".endswith(f".{name}"))
        found = next(named, None)
    tokens = tuple(found) if isinstance(found, list) else ()
    known = all(type(token) is int and 0 <= token < shape[0] for token in tokens)
    if not tokens or not known or len(parts) > 1:
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG}: trainable_token_indices is {found!r:.60}, "
            f"expected token ids below {shape[0]} for {module}, without LoRA on it"
        )
    _check_shape(adapter, parts["token_adapter"], (len(tokens), *shape[1:]))
    return Change(some=parts["token_adapter"], tokens=tokens)


def _check_shape(adapter: Adapter, stored: str, expected: tuple[int, ...]) -> None:
    found = adapter.tensors[stored].shape
    if found != expected:
        raise CheckpointError(
            f"{adapter.path}: tensor {stored} has shape {found}, expected {expected} for this "
            f"base; {_trained_on(adapter)}"
        )


def _trained_on(adapter: Adapter) -> str:
    if adapter.base is None:
        return "give the model that the adapter was trained on"
    return f"the adapter was trained on {adapter.base}"


def _rank_and_scale(adapter: Adapter, module: str) -> tuple[int, float]:
    """The module's rank, and alpha / rank (rsLoRA: alpha / √rank) times the adapter's weight."""
    config, path = adapter.config, adapter.folder / ADAPTER_CONFIG
    rank = _pattern(config.get("rank_pattern"), module, path, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, path, config.get("lora_alpha"))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise CheckpointError(
            f"{path}: r is {rank!r:.40} for {module}, expected an integer above 0"
        )
    if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise CheckpointError(
            f"{path}: lora_alpha is {alpha!r:.40} for {module}, expected a number"
        )
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return rank, adapter.weight * alpha / divisor


def _pattern(patterns: object, module: str, path: Path, default: object) -> object:
    """The value of the first pattern that matches the end of the module's name, as PEFT does."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern, value in patterns.items():
        try:
            if matches(rf"(.*\.)?({pattern})$", module):
                return value
        except ValueError as error:
            raise CheckpointError(
                f"{path}: pattern {pattern!r:.60} is not a regular expression: {error}"
            ) from error
    return default


def _tied(
    adapter: Adapter, changes: dict[str, tuple[Change, ...]], notes: tuple[str, ...]
) -> tuple[Mapping[str, tuple[Change, ...]], tuple[str, ...]]:
    """The changes of a model whose head is its table; `HEAD` among them makes it another matrix.

    PEFT trains the two apart. `merge_and_unload` adds products to the one tensor, but a replaced
    head or table becomes a tensor of its own.
    """
    head, table = changes.pop(HEAD, ()), changes.get(TABLE, ())
    if not head and not table:
        return changes, notes
    if table and not head and table[0].some:  # PEFT changes these rows of the head too
        return changes, notes
    if any(change.is_replacement for change in (*table, *head)):
        if adapter.is_tied or _are_equal(adapter, (*table, *head)):
            return {**changes, TABLE: table or head}, notes
        note = (
            f"adapter {adapter.name} gives {'lm_head' if head else 'embed_tokens'} values of its "
            "own, so the merged model has a head apart from its embedding table"
        )
        return {**changes, TABLE: table, HEAD: head}, (*notes, note)
    if adapter.is_tied and table:
        return changes, notes
    trained = " and ".join(["embed_tokens"] * bool(table) + ["lm_head"] * bool(head))
    note = (
        f"adapter {adapter.name} changes {trained}; Gemma has one tensor for both, which gets "
        "every change, as in PEFT's merge_and_unload, so the model differs from the unmerged one"
    )
    # The head's base layer is the same tensor.
    merged = (*table, *(replace(change, whole=None) if table else change for change in head))
    return {**changes, TABLE: merged}, (*notes, note)


def _are_equal(adapter: Adapter, changes: Sequence[Change]) -> bool:
    """Whether table and head are replaced by the same bytes."""
    stored = [adapter.tensors[one.whole] for one in changes if one.whole and one.is_replacement]
    if len(stored) != 2 or (stored[0].dtype, stored[0].shape) != (stored[1].dtype, stored[1].shape):
        return False
    with adapter.path.open("rb") as one, adapter.path.open("rb") as other:
        one.seek(stored[0].offset)
        other.seek(stored[1].offset)
        steps = range(0, stored[0].bytes, _COMPARED)
        sizes = (min(_COMPARED, stored[0].bytes - done) for done in steps)
        return all(one.read(size) == other.read(size) for size in sizes)
