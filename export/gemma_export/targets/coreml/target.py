"""The Core ML target: `.mlpackage`s for iOS 18 and macOS 15, built without a Mac.

They have run on our interpreter (`gemma_runtime.mil`), never on Apple's runtime.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gemma_export.formats.format import Format
from gemma_export.model.config import PER_LAYER_TABLE, GemmaConfig
from gemma_export.progress import Tick
from gemma_export.targets import Artifact, ExportJob, Geometry, refuse_split
from gemma_export.targets.coreml import TARGET
from gemma_export.targets.shared.apple import Headroom, ring_caches
from gemma_export.targets.shared.apple_layout import Compute, Layout, make_layout
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import Graph, LayerCache
from gemma_runtime.manifest import Target as Runtime
from gemma_runtime.quiet import quiet


@dataclass(frozen=True, slots=True)
class CoremlTarget:
    name: ClassVar[str] = TARGET.name
    coreml_compute: str
    coreml_embed: str | None  # None: inside for the GPU, external for the Neural Engine

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """Rings of exactly `window` slots, since attention reads the ring before writing."""
        if self.coreml_compute == "ane" and config.shared_layers:
            raise TargetError(
                "the layout for the Neural Engine cuts a model into packages of 1 GB, which can't "
                "read each other's caches as this model's layers do; choose --coreml-compute gpu"
            )
        return ring_caches(self.name, config, geometry)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """The GPU supports every format; the Neural Engine one symmetric scale per channel."""
        refuse_split(self.name, formats)
        if self.coreml_compute == "ane":
            if self.coreml_embed == "inside":
                raise TargetError(
                    "the Neural Engine can't look up embeddings; remove --coreml-embed inside"
                )
            for name, fmt in formats.items():
                if name == PER_LAYER_TABLE:  # looked up by the app
                    continue
                if not fmt.is_float and (fmt.asymmetric or not fmt.per_channel):
                    raise TargetError(
                        f"the Neural Engine has no kernel for {name} as {fmt}; it supports one "
                        "symmetric scale per output channel: --quant int8-channel or none"
                    )

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        layout = self._layout(job)
        files = [f"model{_suffix(index)}.mlpackage" for index in range(len(layout.parts))]
        with quiet():
            from gemma_export.targets.coreml.program import write_packages
            from gemma_export.targets.shared.float16 import check_logits
            from gemma_export.targets.shared.table_file import write_tables

            check_logits(job)
            write_packages(job, layout, [folder / file for file in files], progress)
        tables = write_tables(job.store, layout, folder)
        return Artifact(
            graphs=_graphs(layout, files, job.geometry.prefill_length),
            caches=layout.caches,
            cache_dtype="float16",
            # coremltools runs it on macOS, our interpreter elsewhere.
            runtime=Runtime(
                self.name, "Core ML", ("coremltools", "gemma-export"), "iOS 18, macOS 15"
            ),
            tools=("coremltools",),
            headroom_factor=Headroom.of(job).residual,
            roles=tables,
        )

    def _layout(self, job: ExportJob) -> Layout:
        caches = self.caches(job.config, job.geometry)
        compute: Compute = "ane" if self.coreml_compute == "ane" else "gpu"
        external = self.coreml_embed == "external" or compute == "ane"
        return make_layout(job.config, caches, job.store.formats, compute, external)


def _suffix(index: int) -> str:
    """Nothing for the first part, then -2, -3 …."""
    return f"-{index + 1}" if index else ""


def _graphs(layout: Layout, files: list[str], prefill_length: int) -> dict[str, tuple[Graph, ...]]:
    return {
        name: tuple(
            Graph(
                file=f"{file}/Manifest.json",
                inputs=layout.inputs(part, tokens),
                outputs=layout.outputs(part, tokens),
                states=layout.states(part),
            )
            for file, part in zip(files, layout.parts, strict=True)
        )
        for name, tokens in {"prefill": prefill_length, "decode": 1}.items()
    }
