"""The official checkpoints: hub ids, and configs for planning and random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import ENCODERS, FAMILIES, Family
from gemma_export.model.hf_config import config_from_hf
from gemma_runtime.errors import ConfigError, nearest_first


@dataclass(frozen=True, slots=True)
class Official:
    family: str
    size: str
    hub_id: str
    hf_config: Mapping[str, Any]

    @property
    def config(self) -> GemmaConfig:
        return config_from_hf(self.hf_config)


def _official(families: Mapping[str, Family]) -> tuple[Official, ...]:
    return tuple(
        Official(family.name, size, family.hub_name(size), config)
        for family in families.values()
        for size, config in family.sizes.items()
    )


OFFICIAL = _official(FAMILIES)
OFFICIAL_ENCODERS = _official(ENCODERS)


def find_official(size: str, family: str | None = None) -> Official:
    """The checkpoint behind `--size`, e.g. 2b; `27b` is Gemma 2's unless `family` says gemma3.

    Raises ConfigError with the known sizes, most similar first.
    """
    for one in FAMILIES.values():
        if family in (None, one.name) and (reason := one.refused_sizes.get(size.lower())):
            raise ConfigError(f"size {size} of {one.title} can't be exported: it is {reason}")
    known = (*OFFICIAL, *OFFICIAL_ENCODERS)
    for official in known:
        if official.size == size.lower() and family in (None, official.family):
            return official
    sizes = list(dict.fromkeys(o.size for o in known if family in (None, o.family)))
    of = f" of {family}" if family else ""
    choices = nearest_first(size.lower(), sizes)
    raise ConfigError(f"unknown size {size!r}{of}; choose from {choices}")
