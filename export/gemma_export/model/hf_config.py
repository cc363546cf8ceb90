"""Reads a `config.json`: of any family, with old or nested rope fields, text or multimodal."""

import struct
import sys
from collections.abc import Mapping
from typing import NoReturn

from gemma_export.model.attention import BIDIRECTIONAL, check_attention
from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import ENCODERS, FAMILIES, Family
from gemma_export.model.official import Json
from gemma_runtime.errors import ConfigError
from gemma_runtime.manifest import AttentionKind, Rope

# The documentation's table.
REFUSED: Mapping[str, str] = {
    "other families, by `model_type`": "expected "
    + ", ".join(f.title for f in (*FAMILIES.values(), *ENCODERS.values())),
    "ropes other than `default`, `linear` and `proportional`": "the decoder doesn't compute them",
    "mixtures of experts, e.g. Gemma 4 26B-A4B": "no target computes them",
    "`attention_bias`, activations other than `gelu_pytorch_tanh`": "no Gemma has them; Gemma 1's "
    "first files call it `gelu`",
}
_KINDS = {"sliding_attention": AttentionKind.LOCAL, "full_attention": AttentionKind.GLOBAL}
_HF_NAMES = {kind: name for name, kind in _KINDS.items()}
_BY_MODEL_TYPE = {
    kind: family
    for family in (*ENCODERS.values(), *FAMILIES.values())  # so that Gemma 3's text type is its own
    for kind in family.text_types
}
_LARGEST = 2**31 - 1  # of any size
_MOST_LAYERS = 1000
_PER_LAYER_FIELDS = ("head_dim", "num_key_value_heads")
_SCALAR = "query_pre_attn_scalar"
_BY_OUTER_TYPE = {
    outer: family
    for family in (*FAMILIES.values(), *ENCODERS.values())
    for outer in family.multimodal
}


def config_from_hf(config: Json) -> GemmaConfig:
    """Read a `config.json`: any family, old or nested rope fields, text or multimodal.

    Raises ConfigError for another model, and for a missing or invalid field.
    """
    text = _text_config(config)
    family = _family(text)
    check_attention(config, text, is_encoder=family.is_encoder)
    _check_supported(text, family)
    hidden, dtype = _positive(text, "hidden_size"), _dtype(config, text)
    kinds, heads = _kinds(text, family), _positive(text, "num_attention_heads")
    shapes = {kind: _head_shape(text, family, kinds, kind) for kind in AttentionKind}
    for kv_heads, _ in shapes.values():
        if heads % kv_heads:
            raise ConfigError(
                f"config: num_attention_heads is {heads}, expected a multiple of "
                f"num_key_value_heads, {kv_heads}"
            )
    kv_heads, head_dim = shapes[AttentionKind.LOCAL]
    ffn, shared = _positive(text, "intermediate_size"), _shared_layers(text, kinds)
    per_layer = text.get("hidden_size_per_layer_input") or 0
    return GemmaConfig(
        family=family.name,
        vocab_size=_positive(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kinds=kinds,
        sliding_window=_window(text, kinds, family),
        max_position=_positive(text, "max_position_embeddings"),
        query_scale=_positive_float({_SCALAR: head_dim, **text}, _SCALAR) ** -0.5
        if family.scaled_queries
        else 1.0,
        ropes=_ropes(text, family),
        rms_norm_eps=_positive_float(text, "rms_norm_eps"),
        qk_norm=family.qk_norm,
        attn_softcap=_softcap(text, "attn_logit_softcapping") if family.attn_softcap else None,
        final_softcap=_softcap(text, "final_logit_softcapping"),
        embed_scale=_embed_scale(hidden, dtype),
        bos_token=_bos(config, text),
        eos_tokens=_eos(config, text),
        tied=config.get("tie_word_embeddings") is not False,
        global_kv_heads=_unlike(shapes[AttentionKind.GLOBAL][0], kv_heads),
        global_head_dim=_unlike(shapes[AttentionKind.GLOBAL][1], head_dim),
        shared_layers=shared,
        shared_intermediate_size=2 * ffn if shared and text.get("use_double_wide_mlp") else None,
        key_is_value=bool(text.get("attention_k_eq_v")),
        value_norm=family.value_norm,
        per_layer=per_layer,
        per_layer_scale=_embed_scale(per_layer, dtype) if per_layer else 1.0,
        layer_scalars=family.layer_scalars,
        plain_gains=family.plain_gains,
        post_norms=family.post_norms,
        mlp_norm=family.mlp_norm,
        per_layer_table=family.per_layer_table,
        is_encoder=family.is_encoder,
        dense=_dense(text, family),
        renamed=family.renamed,
    )


def _family(text: Json) -> Family:
    """Gemma 3's text models are EmbeddingGemma's if their tokens attend to later ones too."""
    family = _BY_MODEL_TYPE[text["model_type"]]
    for encoder in ENCODERS.values():
        if encoder.model_type == family.model_type and text.get(BIDIRECTIONAL) is True:
            return encoder
    return family


def _dense(text: Json, family: Family) -> tuple[int, ...]:
    widths = family.dense(text) if family.dense is not None else ()
    return tuple(_positive({"embedding_dim": width}, "embedding_dim") for width in widths)


def is_multimodal(config: Json) -> bool:
    return str(config.get("model_type")) in _BY_OUTER_TYPE


def _text_config(config: Json) -> Json:
    outer = str(config.get("model_type"))
    if outer in _BY_MODEL_TYPE:
        fields = {**_defaults(outer), **config}
        return {k: v for k, v in fields.items() if k not in _BY_MODEL_TYPE[outer].without}
    if outer not in _BY_OUTER_TYPE:
        raise ConfigError(
            f"model_type {config.get('model_type')!r} is not supported; expected one of "
            f"{', '.join((*_BY_MODEL_TYPE, *_BY_OUTER_TYPE))}"
        )
    expected, text = f"{outer}_text", config.get("text_config")
    kind = text.get("model_type", expected) if isinstance(text, Mapping) else None
    if not isinstance(text, Mapping) or kind != expected:
        _refuse("text_config", kind, f"an object of model_type {expected}")
    return {**_defaults(expected), "model_type": kind, **text}


def _defaults(model_type: str) -> Json:
    family = _BY_MODEL_TYPE[model_type]
    return {**family.defaults, **family.also.get(model_type, {})}


def _check_supported(text: Json, family: Family) -> None:
    activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in family.activations:
        _refuse("hidden_activation", activation, "gelu_pytorch_tanh")
    if text.get("attention_bias"):
        _refuse("attention_bias", True, "false")
    if text.get("partial_rotary_factor") not in (None, 1):
        _refuse("partial_rotary_factor", text["partial_rotary_factor"], "1")
    if text.get("enable_moe_block"):
        _refuse("enable_moe_block", True, "false: no target computes a mixture of experts")
    rows = text.get("vocab_size_per_layer_input")
    has_table = text.get("hidden_size_per_layer_input") and family.per_layer_table
    if has_table and rows != text["vocab_size"]:
        _refuse("vocab_size_per_layer_input", rows, f"vocab_size, {text['vocab_size']}")


def _head_shape(
    text: Json, family: Family, kinds: tuple[AttentionKind, ...], kind: AttentionKind
) -> tuple[int, int]:
    """Number of kv heads, and head size, of one kind of layers.

    `per_layer_config` lists what differs from the other fields, by layer ("05" is layer 5).
    Files without it say the same of global layers in `global_head_dim` and
    `num_global_key_value_heads`.
    """
    per_layer = text.get("per_layer_config")
    if isinstance(per_layer, Mapping):
        layers = {int(key): one for key, one in per_layer.items() if str(key).isdecimal()}
        own = [layers.get(i) or {} for i, one in enumerate(kinds) if one is kind] or [{}]
        if any(one != own[0] for one in own) or not set(own[0]) <= set(_PER_LAYER_FIELDS):
            _refuse("per_layer_config", own, f"{' and '.join(_PER_LAYER_FIELDS)} by kind of layers")
        text = {**text, **own[0]}
    elif kind is AttentionKind.GLOBAL:
        if text.get("global_head_dim") is not None:
            text = {**text, "head_dim": text["global_head_dim"]}
        is_own = text.get("attention_k_eq_v") or family.global_kv_heads
        if is_own and text.get("num_global_key_value_heads") is not None:
            text = {**text, "num_key_value_heads": text["num_global_key_value_heads"]}
    return _positive(text, "num_key_value_heads"), _even(text, "head_dim")


def _unlike(value: int, usual: int) -> int | None:
    return None if value == usual else value


def _shared_layers(text: Json, kinds: tuple[AttentionKind, ...]) -> int:
    """How many layers at the end read the caches of earlier ones of their kind."""
    count = text.get("num_kv_shared_layers") or 0
    is_possible = isinstance(count, int) and 0 <= count < len(kinds)
    owners = kinds[: len(kinds) - count] if is_possible else ()
    if not set(kinds) <= set(owners):
        _refuse("num_kv_shared_layers", count, "a number that leaves a layer of each kind")
    return count


def _kinds(text: Json, family: Family) -> tuple[AttentionKind, ...]:
    """The kinds that are listed, or else every n-th layer global, with the family's n."""
    count = _positive(text, "num_hidden_layers")
    if count > _MOST_LAYERS:  # before anything is made for each
        _refuse("num_hidden_layers", count, f"at most {_MOST_LAYERS} layers")
    types = text.get("layer_types")
    if types is None:
        period = _period(text, family)
        ends = [index % period == period - 1 for index in range(count)]
        types = [_HF_NAMES[AttentionKind.GLOBAL if end else AttentionKind.LOCAL] for end in ends]
    if (
        not isinstance(types, list)
        or len(types) != count
        or not all(isinstance(one, str) and one in _KINDS for one in types)
    ):
        _refuse("layer_types", types, f"{count} of {', '.join(_KINDS)}")
    kinds = tuple(_KINDS[name] for name in types)
    return (*kinds[:-1], AttentionKind.GLOBAL) if family.last_is_global else kinds


def _window(text: Json, kinds: tuple[AttentionKind, ...], family: Family) -> int:
    """The window of local layers; without any, 0 if the file names none."""
    if AttentionKind.LOCAL not in kinds and text.get("sliding_window") is None:
        return 0
    width = _positive(text, "sliding_window")
    return width if family.window is None else family.window(width)


def _period(text: Json, family: Family) -> int:
    key = family.period_key
    return _positive(text, key) if key is not None and key in text else family.global_every


def _ropes(text: Json, family: Family) -> Mapping[AttentionKind, Rope]:
    """Rope by kind, from transformers 5's `rope_parameters` or the older flat fields."""
    written, scaling = text.get("rope_parameters"), text.get("rope_scaling") or {}
    if written is None:
        written = family.defaults.get("rope_parameters")
    for key, value in (("rope_parameters", written or {}), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            _refuse(key, value, "an object")
    base = text.get("rope_theta", family.rope_base)
    if family.local_rope_base is None:
        flat = scaling or written or {}
        if set(flat) & set(_KINDS):
            _refuse("rope_parameters", sorted(flat), "one rope for all layers")
        return dict.fromkeys(AttentionKind, _rope({"rope_theta": base, **flat}))
    # Without rope_parameters, transformers starts with the default type, which hides the key
    # `type` of old files; fields that are not below a kind have no effect.
    start = {"rope_type": "default"} if written is None else {}
    nested = {kind: (written or {}).get(name) or start for kind, name in _HF_NAMES.items()}
    local_base = text.get("rope_local_base_freq", family.local_rope_base)
    return {
        AttentionKind.LOCAL: _rope({"rope_theta": local_base, **nested[AttentionKind.LOCAL]}),
        AttentionKind.GLOBAL: _rope(
            {"rope_theta": base, **nested[AttentionKind.GLOBAL], **scaling}
        ),
    }


def _rope(fields: Json) -> Rope:
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ("default", "linear", "proportional"):
        _refuse("rope_type", kind, "default, linear or proportional")
    base, rotated = _positive_float(fields, "rope_theta"), fields.get("partial_rotary_factor")
    if kind == "proportional":
        factor = 1.0 if fields.get("factor") is None else _positive_float(fields, "factor")
        return Rope(base, factor, 1.0 if rotated is None else _share(rotated))
    if rotated not in (None, 1):
        _refuse("partial_rotary_factor", rotated, f"1 with rope_type {kind}")
    return Rope(base, _positive_float(fields, "factor") if kind == "linear" else 1.0)


def _share(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        _refuse("partial_rotary_factor", value, "a number from 0 to 1")
    return float(value)


def _embed_scale(width: int, dtype: str) -> float:
    """sqrt(width) in the checkpoint's dtype: 59.75, not 59.8665, for a bfloat16 9b."""
    (bits,) = struct.unpack("<I", struct.pack("<f", width**0.5))
    if dtype.removeprefix("torch.") == "bfloat16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # round to nearest even
    (scale,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(scale)


def _dtype(config: Json, text: Json) -> str:
    for source in (text, config):
        for key in ("dtype", "torch_dtype"):
            if isinstance(source.get(key), str):
                return str(source[key])
    return "bfloat16"


def _bos(config: Json, text: Json) -> int:
    for source in (text, config):
        if isinstance(source.get("bos_token_id"), int):
            return int(source["bos_token_id"])
    return 2


def _eos(config: Json, text: Json) -> tuple[int, ...]:
    for source in (config, text):
        value = source.get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value and all(isinstance(x, int) for x in value):
            return tuple(value)
    if config.get("eos_token_id") is None and text.get("eos_token_id") is None:
        return ()  # other files may name some
    _refuse("eos_token_id", text.get("eos_token_id"), "a token id or a list of them")


def _softcap(text: Json, key: str) -> float | None:
    return None if text.get(key) is None else _positive_float(text, key)


def _positive(text: Json, key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _refuse(key, value, "an integer above 0")
    if value > _LARGEST:
        _refuse(key, value, f"an integer of at most {_LARGEST}")
    return value


def _even(text: Json, key: str) -> int:
    value = _positive(text, key)
    if value % 2:
        _refuse(key, value, "an even number, since rope rotates pairs")
    return value


def _positive_float(text: Json, key: str) -> float:
    value = text.get(key)
    if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        _refuse(key, value, "a number above 0")
    return float(value)


def _refuse(key: str, found: object, expected: str) -> NoReturn:
    raise ConfigError(f"config: {key} is {found!r:.200}, expected {expected}")
