"""The Core ML target: an `.mlpackage` for iOS 18 and macOS 15, built without a Mac.

It was executed by our interpreter (`gemma_runtime.mil`), never by Apple's runtime.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gemma_export.config import GemmaConfig, cache_layout
from gemma_export.quantize.recipe import Format
from gemma_export.targets import Artifact, ExportJob, Geometry
from gemma_runtime.errors import MissingExtra, TargetError
from gemma_runtime.manifest import Graph, LayerCache
from gemma_runtime.manifest import Target as Runtime
from gemma_runtime.quiet import quiet

PACKAGE = "model.mlpackage"


@dataclass(frozen=True, slots=True)
class CoremlTarget:
    name: str = "coreml"

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """A ring of exactly the window: it is read before it is written."""
        caches = cache_layout(config, geometry.context_length, None if geometry.full_cache else 0)
        shortest = min(cache.slots for cache in caches)
        if geometry.prefill_length > shortest:  # a chunk would write one slot twice
            raise TargetError(
                f"--prefill is {geometry.prefill_length}, and coreml's shortest cache holds "
                f"{shortest} tokens; give --prefill {shortest} or less"
            )
        return caches

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Every format is held bit for bit; only the converter may be missing."""
        if find_spec("coremltools") is None:
            raise MissingExtra("coremltools", "coreml")

    def write(self, job: ExportJob, folder: Path, progress: Callable[[str, int], None]) -> Artifact:
        with quiet():
            from gemma_export.targets.coreml_ops import headroom_factor
            from gemma_export.targets.coreml_program import (
                graph_inputs,
                graph_outputs,
                graph_states,
                write_package,
            )

            caches = self.caches(job.config, job.geometry)
            write_package(job, caches, folder / PACKAGE, progress)
        lengths = {"prefill": job.geometry.prefill_length, "decode": 1}
        return Artifact(
            graphs={
                name: Graph(
                    file=f"{PACKAGE}/Manifest.json",
                    inputs=graph_inputs(caches, tokens),
                    outputs=graph_outputs(job.config.vocab_size),
                    states=graph_states(caches),
                )
                for name, tokens in lengths.items()
            },
            caches=caches,
            cache_dtype="float16",
            runtime=Runtime(self.name, "Core ML", "iOS 18, macOS 15"),
            tools=("coremltools",),
            headroom_factor=headroom_factor(job.max_residual),
        )
