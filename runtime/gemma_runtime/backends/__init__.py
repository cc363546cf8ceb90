"""Backends: what runs the bundles of a target. A new one is a module here and an entry in BACKENDS.

Functions are named `module:function`, and imported when they are called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What the lowering may cost.

    The reference multiplies in float32. ONNX Runtime's quantized kernels round activations to int8
    in blocks, which alone costs the real 270M a mean KL of 2e-3 (int8) to 4e-3 (int4), and the
    smallest faults hide below that: scores scaled by 1.5 in a single layer are 6e-3. So the same
    graph is replayed with float activations too, which has 1e-10, and nothing can hide in it.
    """

    min_top1: float = 0.98  # near ties not counted against it
    max_mean_kl: float = 1e-2  # of scoring, of decoding, and of one against the other
    max_exact_kl: float = 1e-6  # mean, with float activations
    max_near_ties: float = 0.2  # share of positions, above which PASS becomes AMBIGUOUS


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """How bundles of one target are opened, judged, measured and read back."""

    opener: str  # (Bundle, threads, graph) → Session
    limits: Limits = Limits()
    held_codes: str | None = None  # (Bundle) → the quantized weights that the artifact holds
    profiler: str | None = None  # (Bundle, threads, chunks) → the operators' times, call by call


BACKENDS: Mapping[str, Backend] = {
    "onnx": Backend(
        opener="gemma_runtime.backends.ort:open_ort_session",
        held_codes="gemma_runtime.contents.held_codes:read_onnx",
        profiler="gemma_runtime.backends.ort:profile_ort",
    ),
    "coreml": Backend(
        opener="gemma_runtime.backends.coreml:open_coreml_session",
        held_codes="gemma_runtime.contents.held_codes:read_coreml",
        limits=Limits(max_mean_kl=5e-4),  # float16 throughout costs the 270M 2e-5
    ),
    "coreai": Backend(opener="gemma_runtime.backends.coreai:open_coreai_session"),
    "executorch": Backend(
        opener="gemma_runtime.backends.executorch:open_executorch_session",
        held_codes="gemma_runtime.contents.held_codes:read_executorch",
        profiler="gemma_runtime.backends.executorch:profile_executorch",
        # XNNPACK rounds activations to int8 with one scale for a whole token, which alone costs
        # the real 270M at int4 a mean KL of 2e-2; it has no float kernel for int4 to judge by.
        limits=Limits(max_mean_kl=5e-2),
    ),
    "gguf": Backend(
        opener="gemma_runtime.backends.llama:open_llama_session",
        held_codes="gemma_runtime.contents.held_codes:read_gguf",
    ),
}


def load_function(place: str) -> Callable[..., Any]:
    """The function at `module:function`."""
    module, name = place.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
