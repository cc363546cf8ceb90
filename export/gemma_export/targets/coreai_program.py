"""Writes the `.aimodel`: one program with the functions `prefill` and `decode`."""

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import torch
from coreai_torch import TorchConverter, get_decomp_table
from torch.export import ExportedProgram

from gemma_export.targets import ExportJob
from gemma_export.targets.apple import (
    function_lengths,
    graph_inputs,
    graph_outputs,
    graph_states,
)
from gemma_export.targets.coreai_module import Step
from gemma_runtime.manifest import LayerCache, TensorSpec


def write_asset(
    job: ExportJob,
    caches: Sequence[LayerCache],
    path: Path,
    progress: Callable[[str, int], None],
) -> None:
    import_module("coreai_torch._compression.custom_layers")  # registers the int4 operation
    step = Step(job, caches, progress)
    # The other mode keeps stack traces, with this machine's folders in them.
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    for name, tokens in function_lengths(job.geometry).items():
        inputs = graph_inputs(caches, tokens)
        converter.add_exported_program(
            _trace(step, inputs),
            entrypoint_name=name,
            input_names=[spec.name for spec in inputs],
            state_names=[spec.name for spec in graph_states(caches)],
            output_names=[spec.name for spec in graph_outputs(job.config.vocab_size)],
        )
    with redirect_stdout(StringIO()):  # coreai-torch draws bars of its own
        converter.to_coreai().save_asset(path)


def _trace(step: Step, inputs: Sequence[TensorSpec]) -> ExportedProgram:
    kinds = {"int32": torch.int32, "float16": torch.float16}
    example = tuple(
        torch.zeros([int(size) for size in spec.shape], dtype=kinds[spec.dtype]) for spec in inputs
    )
    with torch.no_grad():
        traced = torch.export.export(step.eval(), example)
        return traced.run_decompositions(get_decomp_table())  # type: ignore[no-any-return]
