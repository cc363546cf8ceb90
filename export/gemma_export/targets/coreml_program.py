"""Writes the `.mlpackage`: one program with the functions `prefill` and `decode`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.converter import mil_convert
from coremltools.converters.mil.mil import Function, Program, types

from gemma_export.decoder import decoder
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets import ExportJob
from gemma_export.targets.apple import (
    function_lengths,
    graph_inputs,
    graph_states,
    headroom_factor,
)
from gemma_export.targets.coreml_ops import MilOps, Weights
from gemma_runtime.manifest import LayerCache
from gemma_runtime.quiet import captured_stderr


def write_package(
    job: ExportJob,
    caches: Sequence[LayerCache],
    path: Path,
    progress: Callable[[str, int], None],
) -> None:
    weights = Weights()
    program = Program()
    for name, tokens in function_lengths(job.geometry).items():
        program.add_function(name, _function(job, caches, tokens, weights, progress))
    program.default_function_name = "prefill"
    program.export_as_multifunction = True
    with captured_stderr():  # coremltools draws bars of its own
        model = mil_convert(
            program,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=ct.target.iOS18,
            compute_units=ct.ComputeUnit.CPU_AND_GPU,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            export_multi_functions=True,
        )
        model.save(str(path))


def _function(
    job: ExportJob,
    caches: Sequence[LayerCache],
    tokens: int,
    weights: Weights,
    progress: Callable[[str, int], None],
) -> Function:
    kinds = {"int32": types.int32, "float16": types.fp16}
    specs = {
        spec.name: mb.TensorSpec(shape=spec.shape, dtype=kinds[spec.dtype])
        for spec in graph_inputs(caches, tokens)
    }
    specs |= {
        spec.name: mb.StateTensorSpec(spec.shape, types.fp16) for spec in graph_states(caches)
    }

    def weight(name: str) -> StoredWeight:
        found = job.store.weight(name)
        progress(name, math.prod(found.shape) // 2)
        return found

    with Function(specs, ct.target.iOS18) as function:
        factor = headroom_factor(job.max_residual)
        context, epsilon = job.geometry.context_length, job.config.rms_norm_eps
        ops = MilOps(function.inputs, weights, caches, context, factor, epsilon)
        function.set_outputs([decoder(ops, job.config, weight)])
    return function
