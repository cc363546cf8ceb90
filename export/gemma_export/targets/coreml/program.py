"""Writes the `.mlpackage`s: programs with the functions `prefill` and `decode`."""

from collections.abc import Iterable
from pathlib import Path

from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from gemma_export.model.decoder import decoder
from gemma_export.progress import Tick
from gemma_export.targets import ExportJob
from gemma_export.targets.coreml.mil_package import VERSION, save_package
from gemma_export.targets.coreml.mil_weights import Weights
from gemma_export.targets.coreml.ops import MilOps
from gemma_export.targets.shared.apple import Headroom
from gemma_export.targets.shared.apple_layout import Layout, Part

_KINDS = {"int32": types.int32, "float16": types.fp16}


def write_packages(job: ExportJob, layout: Layout, paths: Iterable[Path], progress: Tick) -> None:
    """Write one package per part of the layout."""
    mb.name_count.clear()  # global: a second export in this process would get other names
    weights = [Weights() for _ in layout.parts]
    prefill = _functions(job, layout, job.geometry.prefill_length, weights)
    decode = _functions(job, layout, 1, weights)
    for path, own, *functions in zip(paths, weights, prefill, decode, strict=True):
        program = Program()
        for name, function in zip(("prefill", "decode"), functions, strict=True):
            program.add_function(name, function)
        program.default_function_name = "prefill"
        program.export_as_multifunction = True
        save_package(program, own.blobs, path, progress)


def _functions(
    job: ExportJob, layout: Layout, tokens: int, weights: list[Weights]
) -> list[Function]:
    """Build one function per part; a single run of the decoder fills them all."""
    functions = [_function(layout, part, tokens) for part in layout.parts]
    headroom, epsilon = Headroom.of(job), job.config.rms_norm_eps
    ops = MilOps(layout, functions, weights, tokens, headroom, epsilon)
    ops.finish(decoder(ops, job.config, job.store.weight))
    return functions


def _function(layout: Layout, part: Part, tokens: int) -> Function:
    inputs = {
        spec.name: mb.TensorSpec(shape=spec.shape, dtype=_KINDS[spec.dtype])
        for spec in layout.inputs(part, tokens)
    }
    states = {spec.name: mb.StateTensorSpec(spec.shape, types.fp16) for spec in layout.states(part)}
    return Function(inputs | states, VERSION)
