"""Writes an encoder as an ONNX graph: the tokens of one text in, its vector out.

The table is only looked up, so it lies in a data file of its own, which stays mapped.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import onnx

from gemma_export.model.config import TABLE, GemmaConfig
from gemma_export.model.decoder import encoder
from gemma_export.progress import Tick
from gemma_export.quantize.store import QuantizedStore
from gemma_export.targets.onnx import TARGET
from gemma_export.targets.onnx.encoder_ops import OnnxEncoderOps
from gemma_export.targets.onnx.graph import DataFile, GraphBuilder
from gemma_export.targets.onnx.target import DATA, EXACT, MODEL, with_float_activations
from gemma_runtime.manifest import Graph, Target, TensorRole, TensorSpec

TABLE_DATA = "table.onnx.data"
RUNTIME = Target(TARGET.name, "ONNX Runtime", ("onnxruntime",), "1.24.4")
TOOLS = ("onnx", "torch")


def write_encoder(
    config: GemmaConfig, store: QuantizedStore, context: int, folder: Path, progress: Tick
) -> dict[str, Graph]:
    """Write the artifact; returns its graphs by name, as the manifest has them."""
    io = _graph(config.dimensions)
    with ExitStack() as files:
        builder = GraphBuilder(files.enter_context(DataFile(folder / DATA, progress)))
        aside = {TABLE: files.enter_context(DataFile(folder / TABLE_DATA, progress))}
        ops = OnnxEncoderOps(builder, io, context, config.rms_norm_eps, aside)
        ops.finish(encoder(ops, config, store.weight), TensorRole.VECTOR)
        model = builder.model(io.inputs, io.outputs)
    onnx.save(model, folder / MODEL)
    if all(fmt.is_float for fmt in store.formats.values()):
        return {"encode": io}
    onnx.save(with_float_activations(model), folder / EXACT)
    return {"encode": io, "exact": replace(io, file=EXACT)}


def _graph(dimensions: int) -> Graph:
    tokens = TensorSpec("tokens", "int64", (1, "tokens"), TensorRole.TOKENS, None, None)
    vector = TensorSpec("vector", "float32", (1, dimensions), TensorRole.VECTOR, None, None)
    return Graph(file=MODEL, inputs=(tokens,), outputs=(vector,), states=())
