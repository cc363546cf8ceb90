"""The Core AI target: an `.aimodel` for iOS 27 and macOS 27, written and run without a Mac.

It was executed by the runtime in Apple's own Linux wheel, `coreai-core`, never on a device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
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

ASSET = "model.aimodel"
PROGRAM = f"{ASSET}/main.mlirb"


@dataclass(frozen=True, slots=True)
class CoreaiTarget:
    name: str = "coreai"

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """A ring of exactly the window: it is read before it is written."""
        return ring_caches(self.name, config, geometry)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """int4 in symmetric groups, and float16."""
        for package, module in (("coreai-core", "coreai"), ("coreai-torch", "coreai_torch")):
            if find_spec(module) is None:
                raise MissingExtra(package, self.name)
        check_formats(self.name, formats)

    def write(self, job: ExportJob, folder: Path, progress: Callable[[str, int], None]) -> Artifact:
        caches = self.caches(job.config, job.geometry)
        with quiet():
            from gemma_export.targets.coreai_program import write_asset

            write_asset(job, caches, folder / ASSET, progress)
        return Artifact(
            graphs=make_graphs(PROGRAM, job.config, caches, job.geometry),
            caches=caches,
            cache_dtype="float16",
            runtime=Runtime(self.name, "coreai-core", metadata.version("coreai-core")),
            tools=("coreai-core", "coreai-torch", "torch"),
            headroom_factor=headroom_factor(job.max_residual),
        )
