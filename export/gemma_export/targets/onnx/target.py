"""The ONNX Runtime target: one graph for prefill, decode and scoring.

The graph is built node by node from the decoder; weights stream from the store into one external
data file. Inputs: `tokens` (1, T), `total` (number of tokens in the caches after this call),
`wanted` (those of the T positions that get logits). Past and present caches may share buffers.

A quantized bundle contains a second graph with float activations on the same data. It is too slow
to ship, but it is exact, so rounding can't hide errors in the graph. Another graph on the same data
has onnxruntime-genai's inputs, for models that it can run.

Per-layer embeddings lie in a data file of their own, which stays mapped.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from gemma_export.formats.format import Format
from gemma_export.model.config import PER_LAYER_TABLE, GemmaConfig, cache_layout
from gemma_export.progress import Tick
from gemma_export.targets import Artifact, ExportJob, Geometry
from gemma_export.targets.onnx import TARGET
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import Graph, LayerCache, TensorRole, TensorSpec
from gemma_runtime.manifest import Target as Runtime

if TYPE_CHECKING:
    import onnx

MODEL, EXACT, DATA = "model.onnx", "exact.onnx", "model.onnx.data"
PER_LAYER = "per-layer.onnx.data"  # the table of per-layer embeddings
# Slots beyond the window: GroupQueryAttention moves the window only when they are full.
SLACK = 64
_HEAD_STEP = 16  # GroupQueryAttention rotates heads in steps of this
# sliding_window_cache runs on the CPU since 1.29. local_window_size is correct since 1.24.4; before
# that, a query attended to one token too many.
_MIN_WINDOWED, _MIN_FULL = "1.29.0", "1.24.4"
_MIN_INT8 = "1.31.0"  # int8 caches
_MIN_SHARED = "1.31.0"  # layers that read another's cache: 1.29 and 1.30 end the process on them


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    name: ClassVar[str] = TARGET.name

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """Refuses head sizes that GroupQueryAttention would refuse when the bundle runs."""
        for layer in config.layers:
            if layer.head_dim % _HEAD_STEP:
                raise TargetError(
                    f"onnx has no attention kernel for head_dim {layer.head_dim}; it supports "
                    f"multiples of {_HEAD_STEP}: choose another --target"
                )
        return cache_layout(config, geometry.context_length, None if geometry.full_cache else SLACK)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Refuses one scale per channel, because the kernels' groups are powers of two."""
        for name, fmt in formats.items():
            if fmt.per_channel:
                raise TargetError(
                    f"onnx has no kernel for {name} as {fmt}; it supports {TARGET.formats}"
                )

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        import onnx  # takes seconds; plans don't need it

        from gemma_export.model.decoder import decoder
        from gemma_export.targets.onnx.decoder_ops import DecoderOps, is_windowed
        from gemma_export.targets.onnx.genai import CONFIG, write_genai
        from gemma_export.targets.onnx.graph import DataFile, GraphBuilder

        config, store, geometry = job.config, job.store, job.geometry
        caches = self.caches(config, geometry)
        dtype = TARGET.caches[0] if job.cache_scales is None else "int8"
        io = _graph(caches, dtype, config.vocab_size)
        with ExitStack() as files:
            builder = GraphBuilder(files.enter_context(DataFile(folder / DATA, progress)))
            aside = {
                name: files.enter_context(DataFile(folder / PER_LAYER, progress))
                for name in (PER_LAYER_TABLE,)
                if config.per_layer
            }
            context, epsilon = geometry.context_length, config.rms_norm_eps
            ops = DecoderOps(builder, io, caches, context, epsilon, aside, job.cache_scales)
            ops.finish(decoder(ops, config, store.weight), TensorRole.LOGITS)
            model = builder.model((*io.inputs, *io.states), io.outputs)
        onnx.save(model, folder / MODEL)
        exact = io
        if not all(fmt.is_float for fmt in store.formats.values()):
            onnx.save(with_float_activations(model), folder / EXACT)
            exact = replace(io, file=EXACT)
        roles = {}
        if not config.irregular:
            write_genai(folder, job, model, io, caches, min(geometry.prefill_length, SLACK + 1))
            roles = {"genai": CONFIG}
        windowed = any(is_windowed(cache, geometry.context_length) for cache in caches)
        minimum = _MIN_WINDOWED if windowed else _MIN_FULL
        if job.cache_scales is not None:
            minimum = _MIN_INT8
        if any(cache.source is not None for cache in caches):
            minimum = _MIN_SHARED
        return Artifact(
            graphs={"prefill": (io,), "decode": (io,), "exact": (exact,)},
            caches=caches,
            cache_dtype=dtype,
            runtime=Runtime(self.name, "ONNX Runtime", ("onnxruntime",), minimum),
            tools=("onnx", "torch"),
            roles=roles,
        )


def with_float_activations(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph, on the same data, without rounding activations to int8."""
    from gemma_export.targets.onnx.ops import ACCURACY_LEVEL, FLOAT_ACTIVATIONS

    exact = type(model)()
    exact.CopyFrom(model)
    for node in exact.graph.node:
        for attribute in node.attribute:
            if attribute.name == ACCURACY_LEVEL:
                attribute.i = FLOAT_ACTIVATIONS
    return exact


def _graph(caches: tuple[LayerCache, ...], dtype: str, vocab_size: int) -> Graph:
    """Inputs and outputs of the graph. Every cache is an input and an output."""
    shape = (1, "wanted", vocab_size)
    logits = TensorSpec("logits", "float32", shape, TensorRole.LOGITS, None, None)
    return Graph(
        file=MODEL,
        inputs=(
            TensorSpec("tokens", "int64", (1, "tokens"), TensorRole.TOKENS, None, None),
            TensorSpec("total", "int32", (), TensorRole.TOTAL, None, None),
            TensorSpec("wanted", "int64", ("wanted",), TensorRole.WANTED, None, None),
        ),
        outputs=(logits, *_caches("present", caches, dtype)),
        states=tuple(_caches("past", caches, dtype)),
    )


def _caches(prefix: str, caches: tuple[LayerCache, ...], dtype: str) -> Iterator[TensorSpec]:
    for index, cache in enumerate(caches):
        if cache.source is not None:
            continue
        for part, role in (("key", TensorRole.KEYS), ("value", TensorRole.VALUES)):
            name = f"{prefix}_{part}_{index}"
            yield TensorSpec(name, dtype, cache.shape, role, cache.kind, index)
