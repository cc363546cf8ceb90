"""Writes the `.mlpackage`: one program with the functions `prefill` and `decode`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from gemma_export.decoder import decoder
from gemma_export.targets import ExportJob
from gemma_export.targets.coreml_ops import TRASH, MilOps, Weights, headroom_factor, used_kinds
from gemma_export.targets.mil_package import VERSION, save_package
from gemma_runtime.manifest import AttentionKind, LayerCache, TensorSpec


def write_package(
    job: ExportJob,
    caches: Sequence[LayerCache],
    path: Path,
    progress: Callable[[str, int], None],
) -> None:
    weights = Weights()
    program = Program()
    for name, tokens in (("prefill", job.geometry.prefill_length), ("decode", 1)):
        program.add_function(name, _function(job, caches, tokens, weights))
    program.default_function_name = "prefill"
    program.export_as_multifunction = True
    save_package(program, weights.blobs, path, progress)


def graph_inputs(caches: Sequence[LayerCache], tokens: int) -> tuple[TensorSpec, ...]:
    """What a function takes, states not among them."""
    masks = []
    for kind in used_kinds(caches):
        slots = next(cache.slots for cache in caches if cache.kind.value == kind)
        # The old ring and the chunk behind it, or every row of the context with the trash.
        seen = slots + (tokens if kind == AttentionKind.LOCAL.value else TRASH)
        masks += [
            TensorSpec(f"{kind}_slots", "int32", (tokens,)),
            TensorSpec(f"{kind}_mask", "float16", (tokens, seen)),
        ]
    return (
        TensorSpec("tokens", "int32", (tokens,)),
        TensorSpec("positions", "int32", (tokens,)),
        TensorSpec("last", "int32", (1,)),
        *masks,
    )


def graph_outputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("logits", "float16", (1, vocab_size)),)


def graph_states(caches: Sequence[LayerCache]) -> tuple[TensorSpec, ...]:
    """One state per kind of attention: keys and values of its layers, one behind the other."""
    return tuple(
        TensorSpec(f"{kind}_cache", "float16", _state_shape(caches, kind))
        for kind in used_kinds(caches)
    )


def _state_shape(caches: Sequence[LayerCache], kind: str) -> tuple[int, int, int]:
    alike = [cache for cache in caches if cache.kind.value == kind]
    first = alike[0]
    return (2 * first.kv_heads * len(alike), first.slots + TRASH, first.head_dim)


def _function(
    job: ExportJob,
    caches: Sequence[LayerCache],
    tokens: int,
    weights: Weights,
) -> Function:
    kinds = {"int32": types.int32, "float16": types.fp16}
    specs = {
        spec.name: mb.TensorSpec(shape=spec.shape, dtype=kinds[spec.dtype])
        for spec in graph_inputs(caches, tokens)
    }
    specs |= {
        spec.name: mb.StateTensorSpec(spec.shape, types.fp16) for spec in graph_states(caches)
    }

    with Function(specs, VERSION) as function:
        factor = headroom_factor(job.max_residual)
        context, epsilon = job.geometry.context_length, job.config.rms_norm_eps
        ops = MilOps(function.inputs, weights, caches, context, factor, epsilon)
        function.set_outputs([decoder(ops, job.config, job.store.weight)])
    return function
