"""Known faults of runtimes of Gemma, each injected into the right transformers model.

A model with a fault serves twice: its logits show that the checkpoint tells the fault from the
right model, and a system whose logits are the same has this fault. Faults can be combined.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Any], None]
_L, _G = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Fault:
    """`change` alters a copy of the model; `bites` tells whether a model has what it spoils."""

    name: str
    trait: str
    bites: Callable[[Any], bool]
    change: Change
    is_subtle: bool = False  # only float32 tells it from the right model on every checkpoint


@torch.inference_mode()
def logits(model: Any, tokens: list[int], faults: Iterable[Fault] = ()) -> Tensor:
    """The logits at every position of the model with these faults: (T, V) float32."""
    spoiled = copy.deepcopy(model)
    for fault in faults:
        fault.change(spoiled)
    result: Tensor = spoiled(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return result


def faults_of(model: Any) -> list[Fault]:
    return [fault for fault in FAULTS if fault.bites(model)]


def _kind(model: Any, layer: int) -> str:
    kind: str = model.config.layer_types[layer]
    return kind


def _mask(length: int, window: int | None) -> Tensor:
    """What is added to scores, (1, 1, T, T): the lowest float where a query can't see a key."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)[
        None, None
    ]


def _set_windows(windows: Callable[[str, int], int | None], model: Any) -> None:
    """Replace the masks of all layers. `windows` gives a layer's window by its kind and W."""

    def hook(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        window = windows(_kind(model, layer.layer_idx), model.config.sliding_window)
        return arguments, {**named, "attention_mask": _mask(arguments[0].shape[1], window)}

    for index, layer in enumerate(model.model.layers):
        layer.layer_idx = index
        layer.register_forward_pre_hook(hook, with_kwargs=True)


def _in_attention(change: Callable[[Any], None], model: Any) -> None:
    for layer in model.model.layers:
        change(layer.self_attn)


def _drop_attention_softcap(attention: Any) -> None:
    attention.attn_logit_softcapping = None


class _CappedMask:
    """Stands for a mask that is added before the softcap: hidden keys then get the score -cap."""

    def __init__(self, mask: Tensor, cap: float) -> None:
        self._hidden, self._cap = mask < 0, cap

    def __radd__(self, scores: Tensor) -> Tensor:
        return torch.where(self._hidden, -self._cap, scores)


def _softcap_after_mask(model: Any) -> None:
    cap = model.config.attn_logit_softcapping

    def hook(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return arguments, {**named, "attention_mask": _CappedMask(named["attention_mask"], cap)}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(hook, with_kwargs=True)


def _drop_final_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def _set_scaling(attention: Any) -> None:
    attention.scaling = attention.head_dim**-0.5


def _set_embedding_scale(value: Callable[[float], float], model: Any) -> None:
    table = model.model.embed_tokens
    table.embed_scale.fill_(value(table.embedding_dim**0.5))


def _to_bfloat16(value: float) -> float:
    return float(torch.tensor(value).bfloat16())


def _frequencies(model: Any, kind: str) -> Tensor:
    result: Tensor = getattr(model.model.rotary_emb, f"{kind}_inv_freq")
    return result


def _default_frequencies(model: Any, kind: str, of: str) -> Tensor:
    """Unscaled frequencies for the head size of a kind, with the base of another kind."""
    count = _frequencies(model, kind).shape[0]
    base = model.config.rope_parameters[of]["rope_theta"]
    exponents: Tensor = torch.arange(count, dtype=torch.float32) / count
    frequencies: Tensor = base**-exponents
    return frequencies


def _set_ropes(bases: dict[str, str], keeps_factor: bool, model: Any) -> None:
    """Give kinds the base of another, and its linear factor if `keeps_factor`."""
    new = {}
    for kind, of in bases.items():
        factor = model.config.rope_parameters[of].get("factor", 1.0) if keeps_factor else 1.0
        new[kind] = _default_frequencies(model, kind, of) / factor
    for kind, values in new.items():
        _frequencies(model, kind).copy_(values)


def _scale_local_rope(model: Any) -> None:
    _frequencies(model, _L).div_(model.config.rope_parameters[_G]["factor"])


def _norms(model: Any) -> list[Any]:
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None
    ]


def _shift_norms(by: float, model: Any) -> None:
    for norm in _norms(model):
        norm.weight.data.add_(by)


def _round_gains(model: Any) -> None:
    """1 + w, computed in bfloat16."""
    for norm in _norms(model):
        norm.weight.data = (norm.weight.data + 1.0).bfloat16().float() - 1.0


def _exact_gelu(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.GELU()


def _drop_head_norms(attention: Any) -> None:
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            setattr(attention, name, nn.Identity())


def _drop_value_norm(attention: Any) -> None:
    if hasattr(attention, "v_norm"):
        attention.v_norm = nn.Identity()


def _share_first_caches(model: Any) -> None:
    """Layers without caches read the first layer of their kind instead of the last."""
    seen: set[str] = set()
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.store_full_length_kv = _kind(model, index) not in seen
        seen.add(_kind(model, index))


def _values_from_normed_keys(attention: Any) -> None:
    if getattr(attention, "v_proj", True) is None:
        attention.v_norm = nn.Sequential(copy.deepcopy(attention.k_norm), attention.v_norm)


def _drop_per_layer(model: Any) -> None:
    for layer in model.model.layers:
        layer.post_per_layer_input_norm.weight.data.zero_()


def _drop_per_layer_scale(model: Any) -> None:
    model.model.embed_tokens_per_layer.embed_scale.fill_(1.0)


def _drop_per_layer_context(model: Any) -> None:
    model.model.per_layer_projection_norm.weight.data.zero_()


def _drop_layer_scalars(model: Any) -> None:
    for layer in model.model.layers:
        layer.layer_scalar.fill_(1.0)


def _has_window(model: Any) -> bool:
    return _L in model.config.layer_types


def _has(name: str) -> Callable[[Any], bool]:
    return lambda model: bool(getattr(model.config, name, None))


def _is(*families: str) -> Callable[[Any], bool]:
    return lambda model: bool(model.config.model_type.removesuffix("_text") in families)


def _has_linear_rope(model: Any) -> bool:
    ropes = model.config.rope_parameters
    return _is("gemma3")(model) and bool(ropes[_G]["rope_type"] == "linear")


def _odd_scale(model: Any) -> bool:
    scale = getattr(model.config, "query_pre_attn_scalar", None)
    return scale is not None and scale != model.config.head_dim


def _is_rounded(model: Any) -> bool:
    """The scale of embeddings was rounded by the type of the weights, not only to float32."""
    table = model.model.embed_tokens
    return bool(abs(float(table.embed_scale) - table.embedding_dim**0.5) > 1e-3)


_windows = partial(partial, _set_windows)
_embedding = partial(partial, _set_embedding_scale)
FAULTS = (
    Fault("windows on the wrong layers", "window", _has_window,
          _windows(lambda kind, w: None if kind == _L else w)),
    Fault("no windows", "window", _has_window, _windows(lambda kind, w: None)),
    Fault("windows on all layers", "window", _has_window, _windows(lambda kind, w: w)),
    Fault("windows one too long", "window", _has_window,
          _windows(lambda kind, w: w + 1 if kind == _L else None)),
    Fault("windows one too short", "window", _has_window,
          _windows(lambda kind, w: w - 1 if kind == _L else None)),
    Fault("no softcap of attention", "attention softcap", _has("attn_logit_softcapping"),
          partial(_in_attention, _drop_attention_softcap)),
    Fault("softcap of attention after the mask", "attention softcap",
          _has("attn_logit_softcapping"), _softcap_after_mask),
    Fault("no final softcap", "final softcap", _has("final_logit_softcapping"),
          _drop_final_softcap),
    Fault("queries scaled by the head size", "query scale", _odd_scale,
          partial(_in_attention, _set_scaling)),
    Fault("queries scaled by the head size", "query scale", _is("gemma4"),
          partial(_in_attention, _set_scaling)),
    Fault("embeddings not scaled", "embedding scale", lambda model: True,
          _embedding(lambda exact: 1.0)),
    Fault("embedding scale not rounded to bfloat16", "embedding scale", _is_rounded,
          _embedding(lambda exact: exact)),
    Fault("embedding scale rounded to two decimals", "embedding scale", lambda model: True,
          _embedding(lambda exact: round(exact, 2)), is_subtle=True),
    Fault("embedding scale rounded to bfloat16", "embedding scale",
          lambda model: not _is_rounded(model), _embedding(_to_bfloat16)),
    Fault("rope bases swapped", "rope", _is("gemma3", "gemma4"),
          partial(_set_ropes, {_L: _G, _G: _L}, True)),
    Fault("global rope in local layers", "rope", _is("gemma3", "gemma4"),
          partial(_set_ropes, {_L: _G}, True)),
    Fault("local rope in global layers", "rope", _is("gemma3", "gemma4"),
          partial(_set_ropes, {_G: _L}, True)),
    Fault("no rope factor", "rope", _has_linear_rope, partial(_set_ropes, {_G: _G}, False)),
    Fault("rope factor in local layers too", "rope", _has_linear_rope, _scale_local_rope),
    Fault("all columns rotated in global layers", "rope", _is("gemma4"),
          partial(_set_ropes, {_G: _G}, False)),
    Fault("norms without 1 +", "norm", _is("gemma2", "gemma3"), partial(_shift_norms, -1.0)),
    Fault("1 + of norms rounded to bfloat16", "norm",
          lambda model: _is("gemma2", "gemma3")(model) and _is_rounded(model), _round_gains),
    Fault("norms with 1 +", "norm", _is("gemma4"), partial(_shift_norms, 1.0)),
    Fault("exact GELU", "gelu", lambda model: True, _exact_gelu),
    Fault("no norms of queries and keys", "qk norm", _is("gemma3", "gemma4"),
          partial(_in_attention, _drop_head_norms)),
    Fault("no norm of values", "value norm", _is("gemma4"),
          partial(_in_attention, _drop_value_norm)),
    Fault("layers share the first caches", "shared caches", _has("num_kv_shared_layers"),
          _share_first_caches),
    Fault("values from normed keys", "K = V", _has("attention_k_eq_v"),
          partial(_in_attention, _values_from_normed_keys)),
    Fault("no per-layer embeddings", "per-layer embeddings",
          _has("hidden_size_per_layer_input"), _drop_per_layer),
    Fault("per-layer embeddings not scaled", "per-layer embeddings",
          _has("hidden_size_per_layer_input"), _drop_per_layer_scale),
    Fault("per-layer embeddings without context", "per-layer embeddings",
          _has("hidden_size_per_layer_input"), _drop_per_layer_context),
    Fault("no layer scalars", "layer scalar", _is("gemma4"), _drop_layer_scalars),
)  # fmt: skip
