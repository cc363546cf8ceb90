"""The configuration of one Gemma. Code reads these fields instead of testing the family.

`hf_config` reads it from a `config.json`; defaults of each family are in `families`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemma_export.model.families import MLP_NORM
from gemma_runtime.manifest import AttentionKind, LayerCache, Rope

TABLE = "model.embed_tokens.weight"  # the embedding; also the head, where the two are tied
HEAD = "lm_head.weight"  # where they are not
TABLE_FACTORS = "model.embed_tokens.factors"  # (M,) float32, if the table has column factors
# Per-layer embeddings: a second table, whose rows hold a part for each layer.
PER_LAYER_TABLE = "model.embed_tokens_per_layer.weight"
PER_LAYER_PROJECTION = "model.per_layer_model_projection.weight"
PER_LAYER_MATRICES = "*.per_layer_*.weight"  # a pattern for all but the table
PER_LAYER_NORM = "model.per_layer_projection_norm.weight"
DENSE_MATRICES = "dense.*.weight"  # a pattern for the layers behind an encoder's pooled states
# A layer's matrices; those that multiply the same input are together.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
PER_LAYER_GATE = ("per_layer_input_gate",)
PER_LAYER_OUT = ("per_layer_projection",)
# The norms of what attention and MLP give, where a model has them.
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The parameters of one layer."""

    index: int
    kind: AttentionKind
    # Tokens a query attends to, itself included, and in an encoder as many later ones; None on
    # global layers.
    window: int | None
    rope: Rope
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # logits = scale · q·k
    softcap: float | None  # cap · tanh(logits / cap), before the mask
    ffn: int  # width of the feed-forward part
    source: int  # the layer whose keys and values it reads: itself, or an earlier one
    value_is_key: bool  # values are the keys before their norm and rope

    @property
    def owns_cache(self) -> bool:
        return self.source == self.index

    @property
    def qkv(self) -> tuple[str, ...]:
        """Its matrices of queries, keys and values."""
        if not self.owns_cache:
            return QKV[:1]
        return QKV[:2] if self.value_is_key else QKV


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
    global_head_dim: int | None = None  # of global layers; None: as on local ones
    global_kv_heads: int | None = None
    shared_layers: int = 0  # so many layers at the end read the caches of earlier ones
    shared_intermediate_size: int | None = None  # of those layers; None: as in the others
    key_is_value: bool = False  # on global layers
    value_norm: bool = False  # values are normed over each head, without a gain
    per_layer: int = 0  # columns of the per-layer embeddings that each layer reads
    per_layer_scale: float = 1.0  # sqrt(per_layer), rounded like embed_scale
    layer_scalars: bool = False  # each layer's output is multiplied by a number
    plain_gains: bool = False  # the checkpoint stores a norm's gain itself, not gain - 1
    post_norms: bool = True  # what attention and MLP give is normed before it is added
    mlp_norm: str = MLP_NORM  # its name in Hugging Face's files, see `hf_name`
    per_layer_table: bool = True  # tokens have rows of their own in the per-layer embeddings
    is_encoder: bool = False  # tokens attend to later ones too, and a text gives one vector
    dense: tuple[int, ...] = ()  # widths of the layers behind an encoder's pooled states
    renamed: tuple[tuple[str, str], ...] = ()  # parts of names → in Hugging Face's files

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
        return tuple(self._layer(index) for index in range(len(self.kinds)))

    @property
    def owners(self) -> int:
        """How many layers have a cache of their own; they come first."""
        return len(self.kinds) - self.shared_layers

    @property
    def last_owner(self) -> int:
        """The layer after whose attention only the wanted positions are computed."""
        return self.owners - 1

    @property
    def lenders(self) -> frozenset[int]:
        """The layers whose keys and values later ones read."""
        return frozenset(layer.source for layer in self.layers if not layer.owns_cache)

    @property
    def widest_ffn(self) -> int:
        return max(layer.ffn for layer in self.layers)

    @property
    def widest_input(self) -> int:
        """The most inputs of a layer's matrix."""
        heads = max(layer.heads * layer.head_dim for layer in self.layers)
        return max(self.hidden_size, self.widest_ffn, heads)

    @property
    def irregular(self) -> tuple[str, ...]:
        """What only some targets compute, in words; empty for Gemma 2 and 3."""
        traits = {
            "per-layer embeddings": self.per_layer > 0,
            "shared caches": self.shared_layers > 0,
            "two head sizes": self.global_head_dim not in (None, self.head_dim),
            "two numbers of kv heads": self.global_kv_heads not in (None, self.kv_heads),
            "keys as values": self.key_is_value,
            "norms of values": self.value_norm,
            "layer scalars": self.layer_scalars,
            "partial ropes": any(rope.rotated != 1 for rope in self.ropes.values()),
        }
        return tuple(name for name, is_there in traits.items() if is_there)

    def _layer(self, index: int) -> LayerSpec:
        kind = self.kinds[index]
        is_global, is_shared = kind is AttentionKind.GLOBAL, index >= self.owners
        return LayerSpec(
            index=index,
            kind=kind,
            window=None if is_global else self.sliding_window,
            rope=self.ropes[kind],
            heads=self.heads,
            kv_heads=(is_global and self.global_kv_heads) or self.kv_heads,
            head_dim=(is_global and self.global_head_dim) or self.head_dim,
            scale=self.query_scale,
            softcap=self.attn_softcap,
            ffn=(is_shared and self.shared_intermediate_size) or self.intermediate_size,
            source=self._last_owner_of(kind) if is_shared else index,
            value_is_key=is_global and self.key_is_value,
        )

    def _last_owner_of(self, kind: AttentionKind) -> int:
        return max(index for index in range(self.owners) if self.kinds[index] is kind)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its Hugging Face name; a tied head has none of its own."""
        shapes: dict[str, tuple[int, ...]] = {TABLE: (self.vocab_size, self.hidden_size)}
        if self.per_layer:
            parts = len(self.kinds) * self.per_layer
            if self.per_layer_table:
                shapes[PER_LAYER_TABLE] = (self.vocab_size, parts)
            shapes[PER_LAYER_PROJECTION] = (parts, self.hidden_size)
            shapes[PER_LAYER_NORM] = (self.per_layer,)
        for layer in self.layers:
            for name, shape in self._layer_shapes(layer).items():
                shapes[f"model.layers.{layer.index}.{name}.weight"] = shape
            if self.layer_scalars:
                shapes[layer_scalar(layer.index)] = (1,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes[HEAD] = shapes[TABLE]
        inputs = (self.hidden_size, *self.dense)
        for index, outputs in enumerate(self.dense):
            shapes[dense_layer(index)] = (outputs, inputs[index])
        return shapes

    def hf_name(self, name: str) -> str:
        """A weight's name in Hugging Face's files.

        Gemma 1 names the norm before the MLP as Gemma 2 names the norm of what attention gives.
        """
        name = name.replace(f".{MLP_NORM}.", f".{self.mlp_norm}.")
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    def products(self) -> Iterator[list[str]]:
        """Names of all matrices; those that multiply the same input are together."""
        yield [TABLE]
        if self.per_layer:
            if self.per_layer_table:
                yield [PER_LAYER_TABLE]
            yield [PER_LAYER_PROJECTION]
        ends = (PER_LAYER_GATE, PER_LAYER_OUT) if self.per_layer else ()
        for layer in self.layers:
            for together in (layer.qkv, ATTENTION_OUT, GATE_UP, DOWN, *ends):
                yield [f"model.layers.{layer.index}.{name}.weight" for name in together]
        if not self.tied:
            yield [HEAD]
        for index in range(len(self.dense)):
            yield [dense_layer(index)]

    def _layer_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        width = self.hidden_size
        q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (q, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, q),
            "post_attention_layernorm": (width,),
            MLP_NORM: (width,),
            "mlp.gate_proj": (layer.ffn, width),
            "mlp.up_proj": (layer.ffn, width),
            "mlp.down_proj": (width, layer.ffn),
            "post_feedforward_layernorm": (width,),
        }
        for name in (*set(QKV) - set(layer.qkv), *(() if self.post_norms else POST_NORMS)):
            del shapes[name]
        if self.qk_norm:
            shapes["self_attn.q_norm"] = (layer.head_dim,)
            if layer.owns_cache:
                shapes["self_attn.k_norm"] = (layer.head_dim,)
        if self.per_layer:
            shapes["per_layer_input_gate"] = (self.per_layer, width)
            shapes["per_layer_projection"] = (width, self.per_layer)
            shapes["post_per_layer_input_norm"] = (width,)
        return shapes

    @property
    def looked_up(self) -> int:
        """Parameters of tables of which a token reads one row, and that are not the head."""
        shapes = self.tensor_shapes()
        names = {PER_LAYER_TABLE} & shapes.keys()
        if self.is_encoder or not self.tied:
            names |= {TABLE}
        return sum(math.prod(shapes[name]) for name in names)

    @property
    def dimensions(self) -> int:
        """Of an encoder's vectors."""
        return self.dense[-1] if self.dense else self.hidden_size

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


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
            source=None if layer.owns_cache else layer.source,
        )
        for layer in config.layers
    )


def layer_scalar(index: int) -> str:
    """Name of the number that a layer's output is multiplied by."""
    return f"model.layers.{index}.layer_scalar"


def dense_layer(index: int) -> str:
    """Name of a layer behind an encoder's pooled states."""
    return f"dense.{index}.weight"


def is_gain(name: str) -> bool:
    """Whether a weight is a norm's gain."""
    return name.endswith("norm.weight")
