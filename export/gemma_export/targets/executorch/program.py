"""Writes the `.pte`: the decoder builds the delegates, torch.export traces the frame."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.passes import MemoryPlanningPass
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from gemma_export.model.config import PER_LAYER_TABLE, TABLE
from gemma_export.model.decoder import decoder
from gemma_export.progress import Tick
from gemma_export.targets import ExportJob
from gemma_export.targets.executorch.frame import CachedFrame, Frame
from gemma_export.targets.executorch.named_data import NamedData
from gemma_export.targets.executorch.ops import XnnOps
from gemma_export.targets.executorch.pte_tables import fill_in
from gemma_export.targets.executorch.traced import TracedFrame
from gemma_runtime.manifest import LayerCache


def write_program(
    job: ExportJob,
    caches: Sequence[LayerCache],
    path: Path,
    progress: Tick,
) -> None:
    """Write a dynamic `forward(tokens, start)` and the metadata methods of the stock runners."""
    with TemporaryDirectory(dir=path.parent) as folder:
        frame = _build(job, caches, NamedData(Path(folder), progress))
        edge = to_edge(
            _trace(frame, job.geometry.prefill_length),
            constant_methods=_metadata(job),
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                run_reinplace_pass=True,
                emit_mutable_buffer_names=True,  # so that a runtime can save the caches
                memory_planning_pass=_CachesPlannedOnce(),
            )
        )
        with path.open("wb") as file:
            program.write_to_file(file)
    fill_in(path, frame.stand_ins)


def write_traced(job: ExportJob, caches: Sequence[LayerCache], path: Path, delegate: str) -> None:
    """Trace the whole decoder and let the delegate's own partitioner lower it."""
    frame = TracedFrame(job.config, caches, job.geometry.context_length, job.store)
    edge = to_edge_transform_and_lower(
        _trace(frame, job.geometry.prefill_length),
        partitioner=[_partitioner(delegate)],
        constant_methods=_metadata(job),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    program = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    with path.open("wb") as file:
        program.write_to_file(file)


def _partitioner(delegate: str) -> Partitioner:
    if delegate == "vulkan":
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner({"require_dynamic_shapes": True})
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT16,
    )
    return CoreMLPartitioner(compile_specs=specs)


class _CachesPlannedOnce(MemoryPlanningPass):  # type: ignore[misc]
    """Plans a cache written in place as the same memory; the stock pass would allocate a copy."""

    def run(
        self, graph_module: GraphModule, graph_signature: ExportGraphSignature | None = None
    ) -> PassResult:
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and "index_put_" in str(node.target):
                node.meta["spec"] = node.args[0].meta["spec"]
        output = graph_module.graph.output_node()
        output.meta["spec"] = [node.meta["spec"] for node in cast(list[Node], output.args[0])]
        planned: PassResult = super().run(graph_module, graph_signature)
        return planned


def _build(job: ExportJob, caches: Sequence[LayerCache], data: NamedData) -> Frame:
    # First, so that they lie together behind the program's constants: see `fill_in`.
    for name in (TABLE, *[PER_LAYER_TABLE] * (job.config.per_layer > 0)):
        data.add_weight(job.store.weight(name))
    ops = XnnOps(data, caches, job.config.rms_norm_eps)
    logits = decoder(ops, job.config, job.store.weight)
    context = job.geometry.context_length
    return Frame(job.config, caches, context, ops.steps, logits.name, data)


def _trace(frame: CachedFrame, prefill_length: int) -> ExportedProgram:
    example = (torch.zeros(1, prefill_length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    if prefill_length == 1:
        return torch.export.export(frame, example)
    tokens = Dim("tokens", min=1, max=prefill_length)
    return torch.export.export(
        frame,
        example,
        dynamic_shapes=({1: tokens}, {}),
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _metadata(job: ExportJob) -> dict[str, object]:
    """Constant methods that ExecuTorch's TextLLMRunner reads before the first token.

    `get_max_seq_len` is the longest chunk: the runner splits prompts into chunks of that length.
    """
    return {
        "get_bos_id": job.config.bos_token,
        "get_eos_ids": list(job.stop_tokens),
        "get_vocab_size": job.config.vocab_size,
        "get_max_seq_len": job.geometry.prefill_length,
        "get_max_context_len": job.geometry.context_length,
        "get_n_layers": len(job.config.kinds),
        "enable_dynamic_shape": job.geometry.prefill_length > 1,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
    }
