"""Reads where generation ends and how it samples from the files beside the weights."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_runtime.errors import ConfigError
from gemma_runtime.manifest import SamplingDefaults

_Json = Mapping[str, Any]
_GREEDY = SamplingDefaults(0.0, 0, 1.0, 0.0, 1.0)
_LEAST = 1e-6
_TOP_K = 50  # what transformers uses where generation_config.json has no top_k
LLAMA_SAMPLING = {  # `general.sampling.*` → field
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a checkpoint says about generation, besides its config."""

    stop_tokens: tuple[int, ...] = ()
    sampling: SamplingDefaults | None = None  # None if the checkpoint names no value


def generation_from_hf(fields: _Json) -> GenerationDefaults:
    """Read a `generation_config.json`. Raises ConfigError for an invalid field."""
    return GenerationDefaults(_stop_tokens(fields.get("eos_token_id")), _sampling(fields))


def generation_from_gguf(metadata: Mapping[str, object]) -> GenerationDefaults:
    """Read `general.sampling.*`, the keys that llama.cpp takes its defaults from."""
    fields = {
        hf: metadata[key]
        for name, hf in LLAMA_SAMPLING.items()
        if (key := f"general.sampling.{name}") in metadata
    }
    if not fields:
        return GenerationDefaults()
    return GenerationDefaults((), _sampling({"top_k": 0, **fields, "do_sample": True}))


def _stop_tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ConfigError(f"eos_token_id is {value!r:.40}, expected a token id or a list of them")
    return tuple(tokens)


def _sampling(fields: _Json) -> SamplingDefaults | None:
    """The sampling values; greedy for `do_sample: false`; None if nothing is named.

    Values without `do_sample` count: transformers ignores them, but their author wants sampling.
    """
    named = {name: fields[name] for name in LLAMA_SAMPLING.values() if fields.get(name) is not None}
    penalty = _number(named, "repetition_penalty", 1.0, _LEAST)
    samples = fields.get("do_sample")
    if samples is None and not named:
        return None
    if samples is False or (samples is None and set(named) == {"repetition_penalty"}):
        return replace(_GREEDY, repetition_penalty=penalty)
    return SamplingDefaults(
        temperature=_number(named, "temperature", 1.0, 0.0),
        top_k=_top_k(named),
        top_p=max(_number(named, "top_p", 1.0, 0.0, 1.0), _LEAST),  # 0 keeps the likeliest token
        min_p=_number(named, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=penalty,
    )


def _top_k(fields: _Json) -> int:
    value = fields.get("top_k", _TOP_K)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"top_k is {value!r:.40}, expected a whole number")
    return max(value, 0)  # -1 also means all tokens


def _number(
    fields: _Json, name: str, default: float, least: float, most: float = math.inf
) -> float:
    value = fields.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= min(most, sys.float_info.max):
        limits = f"a number from {least:g}" + ("" if math.isinf(most) else f" to {most:g}")
        raise ConfigError(f"{name} is {value!r:.40}, expected {limits}")
    return round(float(value), 6)  # GGUF stores 0.95 as 0.949999988
