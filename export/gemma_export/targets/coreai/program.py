"""Writes the `.aimodel`: one program with the functions `prefill` and `decode`."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import torch
from coreai_torch import TorchConverter, get_decomp_table
from torch.export import ExportedProgram

from gemma_export.progress import Tick
from gemma_export.targets import ExportJob
from gemma_export.targets.coreai.module import Step
from gemma_export.targets.shared.apple_layout import Layout
from gemma_runtime.manifest import Graph, TensorSpec


def write_asset(
    job: ExportJob,
    layout: Layout,
    graphs: Mapping[str, Graph],
    path: Path,
    progress: Tick,
) -> None:
    import_module("coreai_torch._compression.custom_layers")  # registers dequantization
    step = Step(job, layout, progress)
    # The debug mode stores stack traces, which contain paths of this machine.
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    for name, graph in graphs.items():
        converter.add_exported_program(
            _trace(step, graph.inputs),
            entrypoint_name=name,
            input_names=_names(graph.inputs),
            state_names=_names(graph.states),
            output_names=_names(graph.outputs),
        )
    with redirect_stdout(StringIO()):  # coreai-torch prints its own progress bars
        converter.to_coreai().save_asset(path)


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]


def _trace(step: Step, inputs: Sequence[TensorSpec]) -> ExportedProgram:
    kinds = {"int32": torch.int32, "float16": torch.float16}
    example = tuple(
        torch.zeros([int(size) for size in spec.shape], dtype=kinds[spec.dtype]) for spec in inputs
    )
    with torch.no_grad():
        traced = torch.export.export(step.eval(), example)
        return traced.run_decompositions(get_decomp_table())  # type: ignore[no-any-return]
