"""An architecture's keys in GGUF metadata, checked as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma_export.model.families import Family
from gemma_runtime.errors import ConfigError
from gemma_runtime.formats.gguf import Value

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_PATTERN = "attention.sliding_window_pattern"
_LISTS = (_PATTERN, "attention.head_count_kv", "feed_forward_length")


@dataclass(frozen=True, slots=True)
class Fields:
    """The values by key, without the architecture's prefix."""

    family: Family
    values: Mapping[str, Value]

    def require(self, key: str) -> Value:
        if key not in self.values:
            raise ConfigError(
                f"GGUF metadata has no {self.family.name}.{key}; convert the model again"
            )
        return self.values[key]

    def count(self, key: str, least: int = 1) -> int:
        value = self.require(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"{self.family.name}.{key} is {value!r:.40}, expected a whole number above "
                f"{least - 1}"
            )
        return value

    def each(self, key: str, layers: int) -> list[int]:
        """The whole numbers of all layers, from a list or from one value for all of them."""
        value = self.require(key)
        if not isinstance(value, np.ndarray):
            return [self.count(key)] * layers
        numbers: list[int] = value.tolist()
        if len(numbers) != layers or value.dtype.kind not in "iu" or min(numbers, default=0) < 1:
            raise ConfigError(
                f"{self.family.name}.{key} is {value!r:.60}, expected {layers} whole numbers above "
                "0, one per layer"
            )
        return numbers

    def layer_types(self, layers: int) -> list[str] | None:
        """The kinds of all layers, from a period or from one flag per layer; None if not given."""
        pattern = self.values.get(_PATTERN)
        if pattern is None:
            return None
        if isinstance(pattern, np.ndarray) and len(pattern) == layers:
            local = [bool(one) for one in pattern]
        elif isinstance(pattern, int) and pattern > 0:
            local = [index % pattern < pattern - 1 for index in range(layers)]
        else:
            raise ConfigError(
                f"{_PATTERN} is {pattern!r:.40}, expected a period or one flag per layer"
            )
        return [LOCAL if one else GLOBAL for one in local]


def read_fields(metadata: Mapping[str, Value], family: Family) -> Fields:
    """The family's fields. Raises ConfigError for a list of what all its layers share."""
    prefix, lists = f"{family.name}.", _LISTS if family.gguf.unlike_layers else (_PATTERN,)
    values: dict[str, Value] = {}
    for key, value in metadata.items():
        name = key.removeprefix(prefix)
        if name == key:
            continue
        if isinstance(value, list | np.ndarray) and name not in lists:
            raise ConfigError(f"{key} is a list, expected one value for all layers")
        values[name] = value
    return Fields(family, values)
