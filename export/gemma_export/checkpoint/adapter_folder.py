"""Opens PEFT adapter folders, without torch, and refuses adapters that can't be merged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_export.formats.downloaded import check_downloaded
from gemma_export.formats.json_file import read_json
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.safetensors import TensorInfo, read_safetensors_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# LoRA variants that are no sum of the weight and a product, and what turns each of them on.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# Initializations that subtract something from the base's weights before training.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The documentation's tables.
MERGED: Mapping[str, str] = {
    "LoRA, rsLoRA, DoRA, with `rank_pattern`, `alpha_pattern`, `layers_to_transform`": "merged",
    "`modules_to_save`, `trainable_token_indices`": "the saved tensors, or rows, replace the "
    "base's. They can't have a weight",
    "LoRA on `embed_tokens` or `lm_head`": "merged as PEFT merges it. Gemma has one tensor for "
    "both, so both change, and a note says so",
    "`modules_to_save` with `embed_tokens` or `lm_head`": "the model gets a head of its own, "
    "unless both are saved and equal",
    "tensors of the vision part": "left out, with a note",
    "`generation_config.json` beside the adapter": "not read, as in PEFT: stop tokens and sampling "
    "values are the base's",
    "trained on a model of another name": "merged if the shapes fit, with a note that names both",
}
REFUSED: Mapping[str, str] = {
    "adapters of another `peft_type`: prompt tuning, IA³, VeRA, LoHa, …": "only LoRA is merged",
    f"adapters with {', '.join(f'`{key}`' for key in _VARIANTS)}": "they are no sum of the weight "
    "and a product",
    f"adapters that started from changed weights: {', '.join(f'`{k}`' for k in _CHANGED_BASE)}": (
        "they fit the changed base; PEFT converts them to plain LoRA"
    ),
    "adapters with trained biases": "Gemma's layers have no biases",
    "an adapter for one tensor beside one that separates head and table": "leave one out",
}


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
    config = read_json(path)
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
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise CheckpointError(f"{path}: {key} is {config[key]!r:.60}, expected a string")
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
    check_downloaded(path)
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
