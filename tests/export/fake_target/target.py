"""Writes all weights, dequantized, into one `.npz` file, and the config into a JSON file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig, cache_layout
from gemma_export.targets import Artifact, ExportJob, Geometry
from gemma_runtime.manifest import Graph, LayerCache, Target, TensorRole, TensorSpec
from tests.export.fake_target import TARGET

MODEL, CONFIG = "model.npz", "model.json"


@dataclass(frozen=True, slots=True)
class FakeTarget:
    name: ClassVar[str] = TARGET.name
    fake_precision: str

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        return cache_layout(config, geometry.context_length, None)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        pass

    def write(self, job: ExportJob, folder: Path, progress: Callable[[str, int], None]) -> Artifact:
        dtype = np.float16 if self.fake_precision == "half" else np.float32
        weights: dict[str, NDArray[np.floating]] = {}
        for name, shape in job.store.shapes.items():
            weights[name] = job.store.weight(name).rows(0, shape[0]).numpy().astype(dtype)
            progress(name, weights[name].nbytes)
        np.savez(folder / MODEL, allow_pickle=False, **weights)
        (folder / CONFIG).write_bytes(msgspec.json.encode(job.config))
        io = Graph(
            file=MODEL,
            inputs=(_tensor(TensorRole.TOKENS, "int64", "tokens"),),
            outputs=(_tensor(TensorRole.LOGITS, "float32", "tokens", job.config.vocab_size),),
            states=(),
        )
        return Artifact(
            graphs={"prefill": (io,), "decode": (io,)},
            caches=self.caches(job.config, job.geometry),
            cache_dtype="float32",
            runtime=Target(self.name, TARGET.label, ("numpy",), "1.26"),
            tools=("numpy",),
        )


def _tensor(role: TensorRole, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(role.value, dtype, shape, role, None, None)
