"""The contract between the exporter and every program that runs a bundle.

`gemma_export` writes it; Python, Kotlin and Swift read it. Apps take every number from here and
copy none. After the first release, a new field raises `SCHEMA_VERSION`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeVar

import msgspec

from gemma_runtime.errors import BundleError
from gemma_runtime.formats.json_bytes import decode_json

SCHEMA_VERSION = 2
DECODER, ENCODER = "decoder", "encoder"  # kinds of bundles: for text, and for vectors of texts
_PURPOSES = {DECODER: "generates text", ENCODER: "gives vectors of texts"}
_COMMANDS = {DECODER: "gemma-runtime run", ENCODER: "gemma-runtime embed"}
M = TypeVar("M")
CACHE_WIDTHS = {"float32": 4, "float16": 2, "int8": 1}  # bytes


class AttentionKind(StrEnum):
    LOCAL = "local"  # a token attends to the last `window` tokens, itself included
    GLOBAL = "global"  # a token attends to the whole context


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's KV cache: keys and values, each (1, kv_heads, slots, head_dim)."""

    kind: AttentionKind
    window: int | None  # tokens a query attends to, itself included; None on global layers
    slots: int  # tokens that the cache holds
    kv_heads: int
    head_dim: int
    source: int | None = None  # the layer whose cache it reads; None: it has one of its own

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, self.kv_heads, self.slots, self.head_dim)

    @property
    def ring_step(self) -> int:
        """How many tokens a full ring of ONNX Runtime drops at once, so that the rest moves up."""
        return self.slots - (self.window or self.slots) + 1

    @property
    def elements(self) -> int:
        """Number of elements in keys and values together; 0 if it reads another layer's."""
        return 0 if self.source is not None else 2 * self.kv_heads * self.slots * self.head_dim


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: angle = position / factor · base^(-2i / head_dim).

    Only the first of the head's pairs turn if `rotated`, their share, is below 1.
    """

    base: float
    factor: float
    rotated: float = 1.0


class TensorRole(StrEnum):
    """The purpose of a graph's tensor. Runners use it; a tensor's name means nothing to them.

    T tokens per call, of which the last may be padding; S slots, D head size, V vocabulary.
    """

    TOKENS = "tokens"  # ids, (T) or (1, T)
    START = "start"  # tokens in the caches before the call
    POSITIONS = "positions"  # position of each token
    TOTAL = "total"  # tokens in the caches after the call
    WANTED = "wanted"  # which of the T tokens get logits
    LAST = "last"  # which of the T tokens is the last that is not padding
    EMBEDDINGS = "embeddings"  # table rows that the caller looks up
    PER_LAYER = "per_layer"  # rows of the table of per-layer embeddings that the caller looks up
    HIDDEN = "hidden"  # the residual between two parts of a graph
    COS = "cos"  # for one kind of layers, (T, D / 2)
    SIN = "sin"
    MASK = "mask"  # for one kind of layers: 0 where a token attends, far below 0 elsewhere
    SLOTS = "slots"  # for one kind of layers: the slot of each token, (T)
    WRITE = "write"  # SLOTS as a one-hot matrix, (S, T)
    KEYS = "keys"  # cache of one layer
    VALUES = "values"
    CACHE = "cache"  # keys and values of all layers of one kind
    LOGITS = "logits"  # (…, V)
    VECTOR = "vector"  # of a text, from an encoder, (1, dimensions)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dtype: str  # in numpy's spelling
    shape: tuple[int | str, ...]  # a string names a dimension that varies from call to call
    role: TensorRole
    kind: AttentionKind | None  # kind of layers that use it; None if any
    layer: int | None  # index of the layer that owns it; None if shared


@dataclass(frozen=True, slots=True)
class Graph:
    """One program of the artifact: its inputs, outputs and states."""

    file: str  # path in the bundle
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]  # caches

    def tensor(self, role: TensorRole) -> TensorSpec:
        """The input or output with this role. Raises BundleError if there is none."""
        for spec in (*self.inputs, *self.outputs):
            if spec.role is role:
                return spec
        raise BundleError(f"manifest.json: {self.file} has no tensor of role {role}; export again")

    def returned_caches(self) -> Iterator[tuple[TensorSpec, TensorSpec]]:
        """Pairs of (state, output that returns it), for runtimes that do not update in place.

        Raises BundleError if no output returns a state.
        """
        outputs = {(spec.role, spec.kind, spec.layer): spec for spec in self.outputs}
        for state in self.states:
            returned = outputs.get((state.role, state.kind, state.layer))
            if returned is None:
                raise BundleError(
                    f"manifest.json: {self.file} does not return {state.name}; export again"
                )
            yield state, returned


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint that the bundle was made from."""

    id: str  # hub id, folder or file name, or `random:SEED`
    family: str  # gemma2, gemma3, gemma4
    parameters: int
    revision: str | None  # commit on the hub, if it came from there
    digest: str  # sha256 over config and weights
    looked_up: int = 0  # parameters of a table that is not the head: a token reads one row


@dataclass(frozen=True, slots=True)
class CalibratedOn:
    """The text used for calibration."""

    source: str  # "default", a file or a folder
    tokens: int
    seed: int  # of the shuffle
    digest: str  # sha256 over the token ids


@dataclass(frozen=True, slots=True)
class Quantization:
    recipe: str
    bits_per_weight: float  # codes, scales and zero points, averaged over all matrices
    codes_digest: str  # over codes, scales and zero points; equal in every container
    tensors: dict[str, str]  # tensor name -> format, e.g. "int4-g32"
    calibration: CalibratedOn | None  # None if codes depend on the weights alone


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    label: str  # the runtime's name for people
    packages: tuple[str, ...]  # PyPI packages that run the artifact in Python; may be empty
    min_runtime_version: str


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How the checkpoint's authors sample; programs use it unless the user says otherwise."""

    temperature: float  # 0 always takes the likeliest token
    top_k: int  # 0 keeps all tokens
    top_p: float
    min_p: float
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Headroom:
    """Headroom for float16: the largest measured residual |x|, and the factor in the weights."""

    max_abs: float
    factor: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """The distance between two sets of logits, without a verdict."""

    positions: int
    top1: float  # share of positions with the same most likely token
    near_ties: int  # positions whose most likely tokens differ by less than the tie margin
    max_abs: float  # max |Δlogit| over the reference's top tokens
    mean_abs: float
    mean_kl: float  # nats
    p99_kl: float


@dataclass(frozen=True, slots=True)
class Int8Caches:
    """What int8 caches round keys and values with, and what that costs."""

    scales_digest: str  # sha256 over the float32 scales of all layers, keys before values
    calibration: CalibratedOn  # the text that the scales were measured on
    quality: Agreement  # int8 caches against float32 ones, on the goldens, with the same weights


@dataclass(frozen=True, slots=True)
class File:
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a device needs to know to run a bundle."""

    schema_version: int
    model: Model
    target: Target
    quantization: Quantization
    vocab_size: int
    context_length: int  # tokens that the caches can hold
    prefill_length: int  # most tokens per prefill call
    bos_token: int
    eos_token: int | None  # what a chat template may write as `eos_token`
    stop_tokens: tuple[int, ...]
    sampling: SamplingDefaults | None  # None if the checkpoint has none
    chat_template: str | None  # Jinja with Hugging Face's conventions
    layers: tuple[LayerCache, ...]
    cache_dtype: str
    # "prefill", "decode", and in some bundles "exact" (float activations). A graph may be split
    # into parts that run one after the other; most have one part.
    graphs: dict[str, tuple[Graph, ...]]
    headroom: Headroom
    quality: Agreement  # quantized reference against float32 reference, on the goldens
    files: dict[str, File]  # path in the bundle -> digest, for all files but manifest.json
    roles: dict[
        str, str
    ]  # "tokenizer", "goldens", "embedding", "per_layer", … -> path in the bundle
    tools: dict[str, str]  # package -> version that wrote the bundle
    # For graphs that take cosines and sines as inputs.
    ropes: dict[AttentionKind, Rope]
    int8_caches: Int8Caches | None = None  # None if cache_dtype is a float type

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Parse a manifest. Raises BundleError for another schema or an invalid field."""
        manifest = decode_manifest(text, DECODER, cls)
        if manifest.cache_dtype not in CACHE_WIDTHS:
            raise BundleError(
                f"manifest.json is not valid: cache_dtype is {manifest.cache_dtype!r}, expected "
                f"{' or '.join(CACHE_WIDTHS)}; export again"
            )
        if (manifest.cache_dtype == "int8") != (manifest.int8_caches is not None):
            raise BundleError(
                "manifest.json is not valid: int8_caches and cache_dtype int8 belong together; "
                "export again"
            )
        for kind in {layer.kind for layer in manifest.layers} - set(manifest.ropes):
            raise BundleError(
                f"manifest.json is not valid: no rope for {kind} layers; export again"
            )
        for name in [name for name, parts in manifest.graphs.items() if not parts]:
            raise BundleError(f"manifest.json is not valid: graph {name} is empty; export again")
        return manifest

    def graph(self, name: str) -> Graph:
        """The graph, if it has one part. Raises BundleError if it is missing or split."""
        parts = self.graphs.get(name, ())
        if len(parts) != 1:
            raise BundleError(
                f"manifest.json has {len(parts)} parts of graph {name}, expected 1; export again"
            )
        return parts[0]

    def graph_files(self) -> list[str]:
        """Files of all graphs, without repetition."""
        return sorted({part.file for parts in self.graphs.values() for part in parts})

    def cache_bytes(self, kind: AttentionKind) -> int:
        """Bytes of all key and value caches of one kind of layers."""
        width = CACHE_WIDTHS[self.cache_dtype]
        return sum(layer.elements * width for layer in self.layers if layer.kind is kind)


@dataclass(frozen=True, slots=True)
class Schema:
    schema_version: int
    kind: str = DECODER


def decode_manifest(text: bytes, kind: str, into: type[M]) -> M:
    """Raise BundleError for another kind or schema, and for an invalid field."""
    check_schema(text, kind)
    try:
        return decode_json(text, into)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise BundleError(f"manifest.json is not valid: {error}; export again") from error


def check_schema(text: bytes, kind: str) -> None:
    """Raise BundleError for another schema, and for a bundle of another kind."""
    schema = read_schema(text)
    found = schema.schema_version
    if found != SCHEMA_VERSION:
        raise BundleError(
            f"manifest.json has schema {found}, this runtime reads {SCHEMA_VERSION}; "
            + ("update gemma-export" if found > SCHEMA_VERSION else "export the model again")
        )
    if schema.kind != kind:
        if schema.kind not in _PURPOSES:
            raise BundleError(
                f"manifest.json is of kind {schema.kind!r:.40}, expected {kind}; update "
                "gemma-export"
            )
        raise BundleError(
            f"the bundle {_PURPOSES[schema.kind]}, expected one that {_PURPOSES[kind]}; use "
            f"{_COMMANDS[schema.kind]}"
        )


def read_schema(text: bytes) -> Schema:
    """What every manifest has, whatever the kind of its bundle."""
    try:
        return decode_json(text, Schema)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise BundleError(f"manifest.json is not a manifest: {error}") from error
