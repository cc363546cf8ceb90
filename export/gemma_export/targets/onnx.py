"""The ONNX Runtime target: one graph for prefill, decode and scoring.

The graph is built node by node from the decoder; weights stream from the store into one external
data file. Inputs: `tokens` (1, T), `total` (the tokens in the caches after this call), `wanted`
(which of the T positions get logits). Past and present caches may be the same buffers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from gemma_export.config import GemmaConfig, cache_layout
from gemma_export.decoder import decoder
from gemma_export.quantize.store import QuantizedStore
from gemma_export.targets import Artifact, Geometry
from gemma_export.targets.onnx_graph import DataFile, GraphBuilder
from gemma_export.targets.onnx_ops import OnnxOps, is_windowed
from gemma_runtime.manifest import Graph, LayerCache, TensorSpec
from gemma_runtime.manifest import Target as Runtime

MODEL, DATA = "model.onnx", "model.onnx.data"
# Rows beyond the window: GroupQueryAttention compacts its window only when they are used up.
SLACK = 64
# sliding_window_cache runs on the CPU from 1.29; local_window_size is right from 1.24.4 (before,
# a query saw one token too many).
_MIN_WINDOWED, _MIN_FULL = "1.29.0", "1.24.4"


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    name: str = "onnx"

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        return cache_layout(config, geometry.context_length, None if geometry.full_cache else SLACK)

    def write(
        self,
        config: GemmaConfig,
        store: QuantizedStore,
        geometry: Geometry,
        folder: Path,
        progress: Callable[[str, int], None],
    ) -> Artifact:
        caches = self.caches(config, geometry)
        with DataFile(folder / DATA, progress) as data:
            graph = GraphBuilder(data)
            ops = OnnxOps(graph, caches, geometry.context_length, config.rms_norm_eps)
            logits = decoder(ops, config, store.weight)
            model = graph.model(ops.inputs(), ops.outputs(logits, config.vocab_size))
        onnx.save(model, folder / MODEL)
        io = _graph(caches, config.vocab_size)
        windowed = any(is_windowed(cache, geometry.context_length) for cache in caches)
        minimum = _MIN_WINDOWED if windowed else _MIN_FULL
        return Artifact(
            graphs={"prefill": io, "decode": io},
            caches=caches,
            cache_dtype="float32",
            runtime=Runtime(self.name, "onnxruntime", minimum),
            tools=("onnx", "torch"),
        )


def _graph(caches: tuple[LayerCache, ...], vocab_size: int) -> Graph:
    states = tuple(
        TensorSpec(f"past_{part}_{index}", "float32", cache.shape)
        for index, cache in enumerate(caches)
        for part in ("key", "value")
    )
    return Graph(
        file=MODEL,
        inputs=(
            TensorSpec("tokens", "int64", (1, "tokens")),
            TensorSpec("total", "int32", ()),
            TensorSpec("wanted", "int64", ("wanted",)),
        ),
        outputs=(TensorSpec("logits", "float32", (1, "wanted", vocab_size)),),
        states=states,
    )
