"""The backends, which run bundles of one target each.

A new one is a module in `backends/` and an entry in BACKENDS.

Functions are named `module:function` and imported when they are called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest lowering error that passes.

    The reference multiplies in float32. ONNX Runtime's quantized kernels round activations to int8
    in blocks. That alone costs the real 270M a mean KL of 2e-3 (int8) to 4e-3 (int4), which could
    hide small faults: attention scores scaled by 1.5 in one layer cost only 6e-3. So the goldens
    are also replayed on the same graph with float activations, whose KL is only 1e-10.
    """

    min_top1: float = 0.98  # share of positions; near ties count as agreeing
    max_mean_kl: float = 1e-2  # of scoring, of decoding, and of decoding against scoring
    max_exact_kl: float = 1e-6  # mean KL with float activations
    max_near_ties: float = 0.2  # share of positions; above it PASS becomes AMBIGUOUS


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """How bundles of one target are opened, judged, measured and read back."""

    opener: str  # (Bundle, threads, graph) → Session
    limits: Limits = Limits()
    scores_together: bool = False  # `score` takes one call, so that drafts can save time
    computes_with: tuple[str, ...] = ()  # packages that round its numbers, beside the bundle's own
    held_codes: str | None = None  # (Bundle) → the artifact's quantized weights
    profiler: str | None = None  # (Bundle, threads, chunks) → operator times of each call
    # Module, package and extra without which no session opens, beside what an export needs.
    needs: tuple[str, str, str] | None = None


BACKENDS: Mapping[str, Backend] = {
    "onnx": Backend(
        opener="gemma_runtime.backends.ort:open_ort_session",
        scores_together=True,
        held_codes="gemma_runtime.contents.held_codes:read_onnx",
        profiler="gemma_runtime.backends.ort:profile_ort",
    ),
    "coreml": Backend(
        opener="gemma_runtime.backends.coreml:open_coreml_session",
        computes_with=("numpy",),
        held_codes="gemma_runtime.contents.held_codes:read_coreml",
        limits=Limits(max_mean_kl=5e-4),  # float16 arithmetic costs the 270M 2e-5
    ),
    "coreai": Backend(opener="gemma_runtime.backends.coreai:open_coreai_session"),
    "executorch": Backend(
        opener="gemma_runtime.backends.executorch:open_executorch_session",
        held_codes="gemma_runtime.contents.held_codes:read_executorch",
        profiler="gemma_runtime.backends.executorch:profile_executorch",
        # XNNPACK rounds activations to int8 with one scale per token. That alone costs the real
        # 270M at int4 a mean KL of 2e-2, and there is no float kernel for int4 to compare with.
        limits=Limits(max_mean_kl=5e-2),
    ),
    "gguf": Backend(
        opener="gemma_runtime.backends.llama:open_llama_session",
        scores_together=True,
        held_codes="gemma_runtime.contents.held_codes:read_gguf",
        needs=("llama_cpp", "llama-cpp-python", "llama"),
    ),
    "hf": Backend(
        opener="gemma_runtime.backends.hf:open_hf_session",
        held_codes="gemma_runtime.contents.held_codes:read_hf",
    ),
}


def load_function(place: str) -> Callable[..., Any]:
    """The function at `module:function`."""
    module, name = place.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
