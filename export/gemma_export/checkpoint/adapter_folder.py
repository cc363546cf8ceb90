"""Reads PEFT's LoRA adapter folders, without torch: which weights an adapter changes, and how.

Names in the file are `base_model.model.MODULE.PART`, with or without the adapter's own name, e.g.
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_export.model.config import TABLE, GemmaConfig
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.safetensors import TensorInfo, read_safetensors_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "lm_head.weight"

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"^(module\.)?(base_model\.(model\.)?)*")
_MULTIMODAL = re.compile(r"^(model\.)?language_model\.(model\.)?")
_VISION = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|base_layer|modules_to_save|original_module)(\.(?P<rest>.+))?"
)
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_FLOATS = ("F32", "F16", "BF16")

# LoRA variants that are no sum of the weight and a product, and what turns each of them on.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Initializations that subtract something from the base's weights before training.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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

    @property
    def is_replacement(self) -> bool:
        return self.down is None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder whose config was checked."""

    folder: Path
    name: str
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        return self.folder / ADAPTER_WEIGHTS

    @property
    def base(self) -> str | None:
        """Folder or hub id of the model that it was trained on."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def label(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}={self.weight:g}"

    @property
    def is_tied(self) -> bool:
        """Whether it trained embedding and head as one."""
        return bool(self.config.get("ensure_weight_tying"))


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def open_adapter(folder: Path, name: str | None = None, weight: float = 1.0) -> Adapter:
    """Read the config and the weights' header. Raises CheckpointError for all but LoRA."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object; save the adapter again")
    _check_config(path, config)
    return Adapter(folder, name or folder.resolve().name, weight, config, _header(folder))


def split_weight(text: str) -> tuple[str, float]:
    """`style=0.7` → ("style", 0.7). A folder whose name has a `=` needs no weight."""
    source, sign, number = text.rpartition("=")
    if not sign or Path(text).expanduser().is_dir():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise CheckpointError(
            f"--adapter {text}: weight {number!r} is not a number; write e.g. {source}=0.7"
        )
    return source, weight


def fit_adapter(
    adapter: Adapter, config: GemmaConfig
) -> tuple[Mapping[str, tuple[Change, ...]], tuple[str, ...]]:
    """The changes by weight, and notes. Raises CheckpointError if they don't fit this model."""
    shapes = config.tensor_shapes()
    has_head = HEAD in shapes
    shapes = shapes if has_head else {**shapes, HEAD: shapes[TABLE]}
    changes: dict[str, tuple[Change, ...]] = {}
    parts, vision = _parts(adapter)
    for module, stored in parts.items():
        name = _weight_name(module, shapes)
        if name is None:
            raise CheckpointError(
                f"{adapter.path} changes {module}, which the base model doesn't have; "
                f"{_trained_on(adapter)}"
            )
        changes[name] = (_change(adapter, module, stored, shapes[name]),)
    if not changes:
        raise CheckpointError(f"{adapter.path} has no LoRA tensors; save the adapter again")
    notes: tuple[str, ...] = ()
    if vision:
        notes = (
            f"adapter {adapter.name}: {vision} tensors of the vision part are left out, because "
            "only the text model is exported",
        )
    return (changes, notes) if has_head else _tied(adapter, changes, notes)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}, expected 'LORA'; only LoRA adapters (with rsLoRA and "
            "DoRA) can be merged"
        )
    for key in _VARIANTS:
        if config.get(key) not in (None, False, [], {}):
            raise CheckpointError(
                f"{path}: {key} is {config[key]!r:.60}, expected none; such an adapter can't be "
                "merged into the weights here"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path}: bias is {config['bias']!r}, expected 'none': Gemma's layers have no biases"
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, so the adapter fits changed base weights; "
            "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _header(folder: Path) -> dict[str, TensorInfo]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code when read; save "
                f"the adapter again as {ADAPTER_WEIGHTS}"
            )
        raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again")
    try:
        return read_safetensors_header(path)[0]
    except ValueError as error:
        raise CheckpointError(f"{path} {error}; download it again") from error


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
    # Saved beside a trained copy: not used after the merge.
    kept = {"modules_to_save": "whole", "original_module": ""}.get(part, part)
    return match["module"], kept, match["rest"] or ""


def _weight_name(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    name = f"{_MULTIMODAL.sub('model.', module)}.weight"
    if name.removeprefix("model.") == HEAD:
        return HEAD
    return next((known for known in (name, f"model.{name}") if known in shapes), None)


def _change(
    adapter: Adapter, module: str, parts: Mapping[str, str], shape: tuple[int, ...]
) -> Change:
    if "whole" in parts:
        _check_shape(adapter, parts["whole"], shape)
        if adapter.weight != 1:
            raise CheckpointError(
                f"adapter {adapter.name} replaces {module} (modules_to_save), so it can't have "
                f"the weight {adapter.weight:g}; leave the weight out"
            )
        return Change(whole=parts["whole"])
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
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{path}: r is {rank!r} for {module}, expected an integer above 0")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r} for {module}, expected a number")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return rank, adapter.weight * alpha / divisor


def _pattern(patterns: object, module: str, path: Path, default: object) -> object:
    """The value of the first pattern that matches the end of the module's name, as PEFT does."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{path}: pattern {pattern!r} is not a regular expression: {error}"
            ) from error
    return default


def _tied(
    adapter: Adapter, changes: dict[str, tuple[Change, ...]], notes: tuple[str, ...]
) -> tuple[Mapping[str, tuple[Change, ...]], tuple[str, ...]]:
    """Move the head's changes to the table: Gemma's head is its embedding table.

    PEFT trains the two apart, but `merge_and_unload` adds both changes to the one tensor.
    """
    head, table = changes.pop(HEAD, ()), changes.get(TABLE, ())
    both = (*table, *head)
    if not both:
        return changes, notes
    if any(change.is_replacement for change in both):
        if len(both) != 2 and not (table and adapter.is_tied):
            name = "lm_head" if head else "embed_tokens"
            raise CheckpointError(
                f"adapter {adapter.name} replaces {name} (modules_to_save) and not the other of "
                "embed_tokens and lm_head; Gemma's head is its embedding table, and an untied head "
                "is not supported"
            )
        return {**changes, TABLE: both}, notes
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


def describe(adapters: Sequence[Adapter]) -> str:
    return ", ".join(adapter.label for adapter in adapters)
