"""The Core AI target: an `.aimodel` for iOS 27 and macOS 27, written and run without a Mac.

It has run on the runtime in Apple's Linux wheel, `coreai-core`, never on a device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig
from gemma_export.progress import Tick
from gemma_export.targets import Artifact, ExportJob, Geometry, refuse_split
from gemma_export.targets.coreai import TARGET
from gemma_export.targets.shared.apple import Headroom, ring_caches
from gemma_export.targets.shared.apple_layout import make_layout
from gemma_runtime.manifest import Graph, LayerCache
from gemma_runtime.manifest import Target as Runtime
from gemma_runtime.quiet import quiet

ASSET = "model.aimodel"
PROGRAM = f"{ASSET}/main.mlirb"


@dataclass(frozen=True, slots=True)
class CoreaiTarget:
    name: ClassVar[str] = TARGET.name

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """Rings of exactly `window` slots, since attention reads the ring before writing."""
        return ring_caches(self.name, config, geometry)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Accepts every format."""
        refuse_split(self.name, formats)

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        caches = self.caches(job.config, job.geometry)
        layout = make_layout(job.config, caches, job.store.formats, "gpu", external=False)
        (part,) = layout.parts
        lengths = {"prefill": job.geometry.prefill_length, "decode": 1}
        graphs = {
            name: Graph(
                file=PROGRAM,
                inputs=layout.inputs(part, tokens),
                outputs=layout.outputs(part, tokens),
                states=layout.states(part),
            )
            for name, tokens in lengths.items()
        }
        with quiet():
            from gemma_export.targets.coreai.program import write_asset
            from gemma_export.targets.shared.float16 import check_logits
            from gemma_export.targets.shared.table_file import write_tables

            check_logits(job)
            write_asset(job, layout, graphs, folder / ASSET, progress)
            tables = write_tables(job.store, layout, folder)
        return Artifact(
            graphs={name: (graph,) for name, graph in graphs.items()},
            caches=caches,
            cache_dtype="float16",
            runtime=Runtime(
                self.name, "Core AI", ("coreai-core",), metadata.version("coreai-core")
            ),
            tools=("coreai-core", "coreai-torch", "torch"),
            roles=tables,
            headroom_factor=Headroom.of(job).residual,
        )
