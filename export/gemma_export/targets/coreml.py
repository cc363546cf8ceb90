"""The Core ML target: an `.mlpackage` for iOS 18 and macOS 15, built without a Mac.

It was executed by our interpreter (`gemma_runtime.mil`), never by Apple's runtime.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gemma_export.config import GemmaConfig
from gemma_export.quantize.recipe import Format
from gemma_export.targets import Artifact, ExportJob, Geometry
from gemma_export.targets.apple import (
    check_formats,
    headroom_factor,
    make_graphs,
    ring_caches,
)
from gemma_runtime.errors import MissingExtra
from gemma_runtime.manifest import LayerCache
from gemma_runtime.manifest import Target as Runtime
from gemma_runtime.quiet import quiet

PACKAGE = "model.mlpackage"


@dataclass(frozen=True, slots=True)
class CoremlTarget:
    name: str = "coreml"

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """A ring of exactly the window: it is read before it is written."""
        return ring_caches(self.name, config, geometry)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """int4 in symmetric groups, and float16."""
        if find_spec("coremltools") is None:
            raise MissingExtra("coremltools", "coreml")
        check_formats(self.name, formats)

    def write(self, job: ExportJob, folder: Path, progress: Callable[[str, int], None]) -> Artifact:
        with quiet():
            from gemma_export.targets.coreml_program import write_package

            caches = self.caches(job.config, job.geometry)
            write_package(job, caches, folder / PACKAGE, progress)
        return Artifact(
            graphs=make_graphs(f"{PACKAGE}/Manifest.json", job.config, caches, job.geometry),
            caches=caches,
            cache_dtype="float16",
            runtime=Runtime(self.name, "Core ML", "iOS 18, macOS 15"),
            tools=("coremltools",),
            headroom_factor=headroom_factor(job.max_residual),
        )
