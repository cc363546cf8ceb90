"""The families of Gemma as data. To add a family, add an entry to FAMILIES; `official` has sizes.

The config reader, `--family`, `--size`, and the GGUF reader and writer all use it. ENCODERS are
apart: they give vectors instead of logits.

Sources: Hugging Face `configuration_gemma.py`, `configuration_gemma2.py`, `…gemma3.py`,
`…gemma4.py`, `…vaultgemma.py` and `…embedding_gemma2.py`, the `config.json` of each hub repository,
google/gemma_pytorch `config.py`, llama.cpp `src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp`,
`gemma4.cpp`, `conversion/gemma.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from gemma_export.model.official import SIZES, Json

MLP_NORM = "pre_feedforward_layernorm"


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """What llama.cpp hard-codes for a family instead of storing it in the file."""

    required: tuple[str, ...]  # keys that have no default, without the architecture's prefix
    width_scaled_layers: int  # the layer count at which queries are scaled by width / heads; or 0
    reads_head: bool  # whether it reads a head apart from the embedding table
    stand_in: str | None = None  # the family as which it is written, having no architecture
    since: str = "b4875"  # llama.cpp's first build that runs it, or Gemma 3
    vocabulary: str = "llama"  # `tokenizer.ggml.model`
    unlike_layers: bool = False  # whether layers' sizes may differ: see `checkpoint/gguf_layers`


@dataclass(frozen=True, slots=True)
class Family:
    """One family. `name` is used for `--family`, for GGUF's architecture and in manifests."""

    name: str
    title: str
    model_type: str  # in config.json
    multimodal: tuple[str, ...]  # model types whose text_config is of this family
    classes: tuple[str, ...]  # architectures in config.json that are causal language models
    defaults: Json  # transformers' defaults for fields missing in config.json
    global_every: int  # every n-th layer is global, unless config.json lists the layers
    period_key: str | None  # field of config.json that overrides n
    rope_base: float
    local_rope_base: float | None  # None: the same as on global layers
    qk_norm: bool
    attn_softcap: bool  # whether attn_logit_softcapping has an effect
    gguf: GgufFamily
    hub_id: str  # of an official checkpoint, with {size} or {SIZE}
    sizes: Mapping[str, Json]  # value of --size → config.json, smallest first
    refused_sizes: Mapping[str, str] = field(default_factory=dict)  # value of --size → the reason
    also: Mapping[str, Json] = field(default_factory=dict)  # other text model types → own defaults
    without: tuple[str, ...] = ()  # fields of config.json that have no effect and aren't written
    activations: tuple[str, ...] = (
        "gelu_pytorch_tanh",
    )  # names in config.json of gelu's tanh form
    scaled_queries: bool = True  # whether query_pre_attn_scalar has an effect
    post_norms: bool = True  # what attention and MLP give is normed before it is added
    mlp_norm: str = MLP_NORM  # name in checkpoints of the norm before the MLP
    value_norm: bool = False  # values are normed over each head, without a gain
    layer_scalars: bool = False  # each layer's output is multiplied by a number
    plain_gains: bool = False  # checkpoints store a norm's gain itself, not gain - 1
    genai_type: str | None = None  # its model type in onnxruntime-genai, if that isn't `model_type`
    licence: str = "gemma"  # of official checkpoints, in the hub's spelling
    last_is_global: bool = False  # whatever config.json says of the last layer
    # What follows is of encoders, which give vectors.
    window: Callable[[int], int] | None = (
        None  # `sliding_window` → tokens seen on each side, plus 1
    )
    dense: Callable[[Json], tuple[int, ...]] | None = None  # widths of the layers behind the mean
    per_layer_table: bool = True  # whether per-layer embeddings have a table of their own
    global_kv_heads: bool = False  # num_global_key_value_heads needs no attention_k_eq_v
    renamed: tuple[tuple[str, str], ...] = ()  # parts of our names → of those in checkpoints

    @property
    def text_types(self) -> tuple[str, ...]:
        """The model types of its text models."""
        return (self.model_type, *self.also)

    @property
    def is_encoder(self) -> bool:
        return self.dense is not None

    def hub_name(self, size: str) -> str:
        """The hub id of an official checkpoint."""
        return self.hub_id.format(size=size, SIZE=size.upper())


# transformers' defaults for all families.
_DEFAULTS: Json = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}

FAMILIES: Mapping[str, Family] = {
    "gemma2": Family(
        name="gemma2",
        title="Gemma 2",
        model_type="gemma2",
        multimodal=(),
        classes=("Gemma2ForCausalLM", "Gemma2Model"),
        defaults={
            **_DEFAULTS,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        global_every=2,
        period_key=None,
        rope_base=10_000.0,
        local_rope_base=None,
        qk_norm=False,
        attn_softcap=True,
        gguf=GgufFamily(required=(), width_scaled_layers=46, reads_head=False),
        hub_id="google/gemma-2-{size}-it",
        sizes=SIZES["gemma2"],
    ),
    "gemma3": Family(
        name="gemma3",
        title="Gemma 3",
        model_type="gemma3_text",
        multimodal=("gemma3",),
        classes=(
            "Gemma3ForCausalLM",
            "Gemma3TextModel",
            "Gemma3ForConditionalGeneration",
            "Gemma3Model",
        ),
        defaults={**_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072},
        global_every=6,
        period_key="sliding_window_pattern",
        rope_base=1_000_000.0,
        local_rope_base=10_000.0,
        qk_norm=True,
        attn_softcap=False,  # transformers reads the field and never applies it
        gguf=GgufFamily(
            required=("attention.sliding_window", "rope.freq_base"),
            width_scaled_layers=62,
            reads_head=True,
        ),
        hub_id="google/gemma-3-{size}-it",
        sizes=SIZES["gemma3"],
    ),
    "gemma4": Family(
        name="gemma4",
        title="Gemma 4",
        model_type="gemma4_text",
        multimodal=("gemma4", "gemma4_unified"),
        classes=(
            "Gemma4ForCausalLM",
            "Gemma4TextModel",
            "Gemma4ForConditionalGeneration",
            "Gemma4Model",
            "Gemma4UnifiedForCausalLM",
            "Gemma4UnifiedTextModel",
            "Gemma4UnifiedForConditionalGeneration",
            "Gemma4UnifiedModel",
        ),
        defaults={
            **_DEFAULTS,
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
            "hidden_size_per_layer_input": 256,
            "global_head_dim": 512,
            "sliding_window": 512,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1_000_000.0,
                },
            },
        },
        also={
            "gemma4_unified_text": {
                "hidden_size_per_layer_input": 0,
                "sliding_window": 1024,
                "max_position_embeddings": 262144,
            }
        },
        global_every=6,
        period_key=None,
        rope_base=1_000_000.0,
        local_rope_base=10_000.0,
        qk_norm=True,
        attn_softcap=False,
        scaled_queries=False,
        value_norm=True,
        layer_scalars=True,
        plain_gains=True,
        last_is_global=True,
        licence="apache-2.0",
        gguf=GgufFamily(
            required=(
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "attention.key_length",
                "attention.key_length_swa",
                "embedding_length_per_layer_input",
                "rope.freq_base",
            ),
            width_scaled_layers=0,
            reads_head=True,
            since="b8639",
            vocabulary="gemma4",
            unlike_layers=True,
        ),
        hub_id="google/gemma-4-{SIZE}-it",
        sizes=SIZES["gemma4"],
        refused_sizes={"26b-a4b": "a mixture of experts, which no target computes"},
    ),
    # Behind the others, so that `--size 2b` and `1b` alone keep meaning Gemma 2 and 3.
    "gemma": Family(
        name="gemma",
        title="Gemma 1",
        model_type="gemma",
        multimodal=(),
        classes=("GemmaForCausalLM", "GemmaModel"),
        defaults={
            "vocab_size": 256000,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "eos_token_id": 1,
        },
        without=(
            "layer_types",
            "sliding_window",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        # Its first files say gelu, but it was trained with the tanh form:
        # https://github.com/huggingface/transformers/pull/29402
        activations=("gelu_pytorch_tanh", "gelu"),
        global_every=1,
        period_key=None,
        rope_base=10_000.0,
        local_rope_base=None,
        qk_norm=False,
        attn_softcap=False,
        post_norms=False,
        mlp_norm="post_attention_layernorm",
        gguf=GgufFamily(required=(), width_scaled_layers=0, reads_head=False),
        hub_id="google/gemma-1.1-{size}-it",
        sizes=SIZES["gemma"],
    ),
    "vaultgemma": Family(
        name="vaultgemma",
        title="VaultGemma",
        model_type="vaultgemma",
        multimodal=(),
        classes=("VaultGemmaForCausalLM", "VaultGemmaModel"),
        defaults={
            **_DEFAULTS,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        global_every=2,
        period_key=None,
        rope_base=10_000.0,
        local_rope_base=None,
        qk_norm=False,
        attn_softcap=True,
        post_norms=False,
        gguf=GgufFamily(required=(), width_scaled_layers=0, reads_head=False, stand_in="gemma"),
        genai_type="decoder",  # which knows no VaultGemma
        hub_id="google/vaultgemma-{size}",
        sizes=SIZES["vaultgemma"],
    ),
}

# Encoders: tokens attend to later ones too, and a text gives one vector.
ENCODERS: Mapping[str, Family] = {
    "embeddinggemma": replace(
        FAMILIES["gemma3"],
        name="embeddinggemma",
        title="EmbeddingGemma",
        multimodal=(),
        classes=("Gemma3TextModel",),
        hub_id="google/embeddinggemma-{size}",
        sizes=SIZES["embeddinggemma"],
        window=lambda width: width // 2 + 1,
        # Only our official size says them: folders hold them as modules of their own.
        dense=lambda text: tuple(text.get("dense", ())),
    ),
    "embeddinggemma2": replace(
        FAMILIES["gemma4"],
        name="embeddinggemma2",
        title="EmbeddingGemma 2",
        model_type="embedding_gemma2_text",
        multimodal=("embedding_gemma2",),
        classes=("EmbeddingGemma2TextModel", "EmbeddingGemma2Model"),
        defaults={
            "vocab_size": 262144,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 512,
            "embedding_dim": 768,
            "sliding_window": 512,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "eos_token_id": 1,
        },
        also={},
        period_key="sliding_window_pattern",
        hub_id="google/embeddinggemma-2",
        sizes=SIZES["embeddinggemma2"],
        refused_sizes={},
        window=lambda radius: radius + 1,
        dense=lambda text: (text["embedding_dim"],),
        per_layer_table=False,
        global_kv_heads=True,
        renamed=(
            ("model.per_layer_", "model.ple.per_layer_"),
            (".per_layer_input_gate.", ".ple_block.per_layer_input_gate."),
            (".per_layer_projection.", ".ple_block.per_layer_projection."),
            (".post_per_layer_input_norm.", ".ple_block.post_per_layer_input_norm."),
            ("dense.0.", "model.embedding_projection."),
        ),
    ),
}
