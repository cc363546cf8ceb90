"""What onnxruntime-genai needs to run the bundle: a graph with its inputs, and its config.

The graph is the shipped one on the same data file. onnxruntime-genai feeds positions instead of
their total, takes the logits of the last token, and allocates the caches for `search.max_length`
tokens, at most the window and its slack on local layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gemma_export.model.families import FAMILIES
from gemma_export.targets import ExportJob
from gemma_export.targets.onnx.decoder_ops import is_windowed
from gemma_export.targets.shared.tokenizer_files import write_json, write_tokenizer_files
from gemma_runtime.manifest import Graph, LayerCache, TensorRole, TensorSpec

GENAI, CONFIG = "genai.onnx", "genai_config.json"
_POSITIONS = "positions"


def write_genai(
    folder: Path,
    job: ExportJob,
    model: onnx.ModelProto,
    io: Graph,
    caches: Sequence[LayerCache],
    chunk: int,
) -> None:
    """Write the graph, the config and the files that its tokenizer reads.

    `io` describes `model`, which stays as it is. Prompts are run in chunks of `chunk` tokens.
    """
    onnx.save(_with_genai_inputs(model, io), folder / GENAI)
    write_json(folder / CONFIG, _config(job, io, caches, chunk))
    if job.tokenizer is not None:
        write_tokenizer_files(job.tokenizer, job.config, folder)


def _with_genai_inputs(model: onnx.ModelProto, io: Graph) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    total, wanted = (io.tensor(role).name for role in (TensorRole.TOTAL, TensorRole.WANTED))
    values = {value.name: value for value in (*graph.input, *graph.output)}
    # One row, so that onnxruntime-genai does not expect the logits of every token.
    values[io.tensor(TensorRole.LOGITS).name].type.tensor_type.shape.dim[1].dim_value = 1
    for past, present in io.returned_caches():
        for spec in (past, present):
            values[spec.name].type.tensor_type.shape.dim[2].dim_param = f"slots_{spec.layer}"
    for name in (total, wanted):
        graph.input.remove(values[name])
    shape = (1, "tokens")
    graph.input.insert(1, helper.make_tensor_value_info(_POSITIONS, TensorProto.INT64, shape))
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), wanted))
    nodes = [*_total(total, graph), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _total(name: str, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that compute the number of tokens in the caches, which is the last position + 1."""
    last, count, one = f"{_POSITIONS}.last", f"{_POSITIONS}.count", f"{_POSITIONS}.one"
    graph.initializer.append(numpy_helper.from_array(np.array(1), one))
    return [
        helper.make_node("ReduceMax", [_POSITIONS], [last], keepdims=0),
        helper.make_node("Add", [last, one], [count]),
        helper.make_node("Cast", [count], [name], to=TensorProto.INT32),
    ]


def _config(job: ExportJob, io: Graph, caches: Sequence[LayerCache], chunk: int) -> dict[str, Any]:
    config, context = job.config, job.geometry.context_length
    family = FAMILIES[config.family]
    return {
        "model": {
            "type": family.genai_type or family.model_type,
            "bos_token_id": config.bos_token,
            "eos_token_id": list(job.stop_tokens),
            "vocab_size": config.vocab_size,
            "context_length": context,
            "decoder": {
                "filename": GENAI,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.kv_heads,
                "num_hidden_layers": len(caches),
                "head_size": config.head_dim,
                "inputs": {
                    "input_ids": io.tensor(TensorRole.TOKENS).name,
                    "position_ids": _POSITIONS,
                    "past_key_names": _template(io.states, TensorRole.KEYS),
                    "past_value_names": _template(io.states, TensorRole.VALUES),
                },
                "outputs": {
                    "logits": io.tensor(TensorRole.LOGITS).name,
                    "present_key_names": _template(io.outputs, TensorRole.KEYS),
                    "present_value_names": _template(io.outputs, TensorRole.VALUES),
                },
                **_sliding_window(caches, context),
            },
        },
        "search": _search(job, chunk),
    }


def _template(specs: Sequence[TensorSpec], role: TensorRole) -> str:
    """The name of the caches of a role, with %d for the layer."""
    spec = next(spec for spec in specs if spec.role is role)
    return f"{spec.name.removesuffix(str(spec.layer))}%d"


def _sliding_window(caches: Sequence[LayerCache], context: int) -> dict[str, Any]:
    local = [index for index, cache in enumerate(caches) if is_windowed(cache, context)]
    if not local:
        return {}
    cache = caches[local[0]]
    window = cache.window or 0
    return {
        "sliding_window": {
            "window_size": window,
            "cache_slack": cache.slots - window,
            "layers": local,
            # GroupQueryAttention drops old rows itself, and any number of tokens fits a call.
            "slide_key_value_cache": False,
            "slide_inputs": False,
        }
    }


def _search(job: ExportJob, chunk: int) -> dict[str, Any]:
    """The manifest's sampling values, but min_p, which onnxruntime-genai doesn't have."""
    fixed = {
        "max_length": job.geometry.context_length,
        "past_present_share_buffer": True,
        "chunk_size": chunk,
    }
    sampling = job.checkpoint.generation.sampling
    if sampling is None:
        return fixed | {"do_sample": False}
    return fixed | {
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_k": min(sampling.top_k, job.config.vocab_size),
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
