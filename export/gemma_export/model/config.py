"""The configuration of one Gemma. Code reads these fields instead of testing the family.

Defaults of each family are in `families`.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from gemma_export.model.causal import check_causal
from gemma_export.model.families import FAMILIES, Family, Json
from gemma_runtime.errors import ConfigError
from gemma_runtime.manifest import AttentionKind, LayerCache, Rope

TABLE = "model.embed_tokens.weight"  # the embedding; also the head, where the two are tied
HEAD = "lm_head.weight"  # where they are not
TABLE_FACTORS = "model.embed_tokens.factors"  # (M,) float32, if the table has column factors
# A layer's matrices; those that multiply the same input are together.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)

# The documentation's table.
REFUSED: Mapping[str, str] = {
    "other families, by `model_type`": f"expected {', '.join(f.title for f in FAMILIES.values())}",
    "ropes other than `default` and `linear`, or partial ones": "the decoder doesn't compute them",
    "`attention_bias`, activations other than `gelu_pytorch_tanh`": "no Gemma has them",
}
_KINDS = {"sliding_attention": AttentionKind.LOCAL, "full_attention": AttentionKind.GLOBAL}
_HF_NAMES = {kind: name for name, kind in _KINDS.items()}
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES.values()}
_BY_OUTER_TYPE = {outer: family for family in FAMILIES.values() for outer in family.multimodal}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The parameters of one attention layer."""

    index: int
    kind: AttentionKind
    window: int | None  # tokens a query attends to, itself included; None on global layers
    rope: Rope
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # logits = scale · q·k
    softcap: float | None  # cap · tanh(logits / cap), before the mask


@dataclass(frozen=True, slots=True)
class GemmaConfig:
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    kinds: tuple[AttentionKind, ...]  # one per layer
    sliding_window: int
    max_position: int
    query_scale: float  # query_pre_attn_scalar ** -0.5
    ropes: Mapping[AttentionKind, Rope]
    rms_norm_eps: float
    qk_norm: bool
    attn_softcap: float | None
    final_softcap: float | None
    embed_scale: float  # sqrt(hidden_size), rounded to the dtype the model was trained in
    bos_token: int
    eos_tokens: tuple[int, ...]
    tied: bool = True  # the head is the embedding table

    @property
    def head(self) -> str:
        """Name of the matrix that turns the last hidden states into logits."""
        return TABLE if self.tied else HEAD

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the matrices with a row per token: the table, and a head apart from it."""
        return (TABLE,) if self.tied else (TABLE, HEAD)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(
            LayerSpec(
                index=index,
                kind=kind,
                window=self.sliding_window if kind is AttentionKind.LOCAL else None,
                rope=self.ropes[kind],
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                scale=self.query_scale,
                softcap=self.attn_softcap,
            )
            for index, kind in enumerate(self.kinds)
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its Hugging Face name; a tied head has none of its own."""
        shapes: dict[str, tuple[int, ...]] = {TABLE: (self.vocab_size, self.hidden_size)}
        for index in range(len(self.kinds)):
            for name, shape in self._layer_shapes().items():
                shapes[f"model.layers.{index}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes[HEAD] = shapes[TABLE]
        return shapes

    def products(self) -> Iterator[list[str]]:
        """Names of all matrices; those that multiply the same input are together."""
        yield [TABLE]
        for index in range(len(self.kinds)):
            for together in (QKV, ATTENTION_OUT, GATE_UP, DOWN):
                yield [f"model.layers.{index}.{name}.weight" for name in together]
        if not self.tied:
            yield [HEAD]

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        width, q, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (q, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, q),
            "post_attention_layernorm": (width,),
            "pre_feedforward_layernorm": (width,),
            "mlp.gate_proj": (self.intermediate_size, width),
            "mlp.up_proj": (self.intermediate_size, width),
            "mlp.down_proj": (width, self.intermediate_size),
            "post_feedforward_layernorm": (width,),
        }
        if self.qk_norm:
            shapes["self_attn.q_norm"] = shapes["self_attn.k_norm"] = (self.head_dim,)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def config_from_hf(config: Json) -> GemmaConfig:
    """Read a `config.json`: any family, old or nested rope fields, text or multimodal.

    Raises ConfigError for another model, and for a missing or invalid field.
    """
    text = _text_config(config)
    family = _BY_MODEL_TYPE[text["model_type"]]
    check_causal(config, text)
    _check_supported(text)
    hidden = _positive(text, "hidden_size")
    heads, kv_heads = _positive(text, "num_attention_heads"), _positive(text, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"config: num_attention_heads is {heads}, expected a multiple of num_key_value_heads, "
            f"{kv_heads}"
        )
    return GemmaConfig(
        family=family.name,
        vocab_size=_positive(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(text, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_even(text, "head_dim"),
        kinds=_kinds(text, family),
        sliding_window=_positive(text, "sliding_window"),
        max_position=_positive(text, "max_position_embeddings"),
        query_scale=_positive_float(text, "query_pre_attn_scalar") ** -0.5,
        ropes=_ropes(text, family),
        rms_norm_eps=_positive_float(text, "rms_norm_eps"),
        qk_norm=family.qk_norm,
        attn_softcap=_softcap(text, "attn_logit_softcapping") if family.attn_softcap else None,
        final_softcap=_softcap(text, "final_logit_softcapping"),
        embed_scale=_embed_scale(hidden, _dtype(config, text)),
        bos_token=_bos(config, text),
        eos_tokens=_eos(config, text),
        tied=config.get("tie_word_embeddings") is not False,
    )


def is_multimodal(config: Json) -> bool:
    return str(config.get("model_type")) in _BY_OUTER_TYPE


def cache_layout(
    config: GemmaConfig, context_length: int, local_slack: int | None
) -> tuple[LayerCache, ...]:
    """The cache of every layer: the context on global layers, window plus slack on local ones.

    With `local_slack=None`, local layers hold the whole context too.
    """
    return tuple(
        LayerCache(
            kind=layer.kind,
            window=layer.window,
            slots=context_length
            if layer.window is None or local_slack is None
            else min(context_length, layer.window + local_slack),
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
        )
        for layer in config.layers
    )


def _text_config(config: Json) -> Json:
    outer = str(config.get("model_type"))
    if outer in _BY_MODEL_TYPE:
        return {**_BY_MODEL_TYPE[outer].defaults, **config}
    if outer not in _BY_OUTER_TYPE:
        raise ConfigError(
            f"model_type {config.get('model_type')!r} is not supported; expected one of "
            f"{', '.join((*_BY_MODEL_TYPE, *_BY_OUTER_TYPE))}"
        )
    family, text = _BY_OUTER_TYPE[outer], config.get("text_config")
    kind = text.get("model_type", family.model_type) if isinstance(text, Mapping) else None
    if not isinstance(text, Mapping) or kind != family.model_type:
        _refuse("text_config", kind, f"an object of model_type {family.model_type}")
    return {**family.defaults, "model_type": kind, **text}


def _check_supported(text: Json) -> None:
    activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        _refuse("hidden_activation", activation, "gelu_pytorch_tanh")
    if text.get("attention_bias"):
        _refuse("attention_bias", True, "false")
    if text.get("partial_rotary_factor") not in (None, 1):
        _refuse("partial_rotary_factor", text["partial_rotary_factor"], "1")


def _kinds(text: Json, family: Family) -> tuple[AttentionKind, ...]:
    """The listed kinds, or else every n-th layer global, with the family's n."""
    count = _positive(text, "num_hidden_layers")
    types = text.get("layer_types")
    if types is None:
        period = _period(text, family)
        last = period - 1
        return tuple(
            AttentionKind.GLOBAL if index % period == last else AttentionKind.LOCAL
            for index in range(count)
        )
    if len(types) != count or not set(types) <= set(_KINDS):
        _refuse("layer_types", types, f"{count} of {', '.join(_KINDS)}")
    return tuple(_KINDS[name] for name in types)


def _period(text: Json, family: Family) -> int:
    key = family.period_key
    return _positive(text, key) if key is not None and key in text else family.global_every


def _ropes(text: Json, family: Family) -> Mapping[AttentionKind, Rope]:
    """Rope by kind, from transformers 5's `rope_parameters` or the older flat fields."""
    written, scaling = text.get("rope_parameters"), text.get("rope_scaling") or {}
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
    if kind not in ("default", "linear"):
        _refuse("rope_type", kind, "default or linear")
    if fields.get("partial_rotary_factor") not in (None, 1):
        _refuse("partial_rotary_factor", fields["partial_rotary_factor"], "1")
    factor = _positive_float(fields, "factor") if kind == "linear" else 1.0
    return Rope(_positive_float(fields, "rope_theta"), factor)


def _embed_scale(hidden_size: int, dtype: str) -> float:
    """sqrt(hidden_size) in the checkpoint's dtype: 59.75, not 59.8665, for a bfloat16 9b."""
    (bits,) = struct.unpack("<I", struct.pack("<f", hidden_size**0.5))
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
    return value


def _even(text: Json, key: str) -> int:
    value = _positive(text, key)
    if value % 2:
        _refuse(key, value, "an even number, since rope rotates pairs")
    return value


def _positive_float(text: Json, key: str) -> float:
    value = text.get(key)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        _refuse(key, value, "a number above 0")
    return float(value)


def _refuse(key: str, found: object, expected: str) -> NoReturn:
    raise ConfigError(f"config: {key} is {found!r}, expected {expected}")
