"""The GGUF target: the store's codes as Q4_0 and Q8_0 blocks, for llama.cpp and Ollama.

llama.cpp fixes two scales that no key can change: it multiplies embeddings by sqrt(width) in
float32, which a bfloat16 Gemma rounds, and scales queries by the head size (27b: by width / heads).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig, cache_layout
from gemma_export.model.families import FAMILIES
from gemma_export.progress import Tick
from gemma_export.targets import Artifact, ExportJob, Geometry, refuse_split
from gemma_export.targets.gguf import TARGET
from gemma_export.targets.gguf.block_types import block_type
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import Graph, LayerCache, TensorRole, TensorSpec
from gemma_runtime.manifest import Target as Runtime

MODEL = "model.gguf"


@dataclass(frozen=True, slots=True)
class GgufTarget:
    name: ClassVar[str] = TARGET.name

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """llama.cpp caches the window plus one chunk (`n_ubatch`) in local layers."""
        slack = None if geometry.full_cache else geometry.prefill_length
        return cache_layout(config, geometry.context_length, slack)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Accepts int4 and symmetric int8 in groups of 32 n, and float32."""
        refuse_split(self.name, formats)
        for name, fmt in formats.items():
            if block_type(fmt) is None:
                raise TargetError(f"gguf can't store {name} as {fmt}; it supports {TARGET.formats}")

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        from gemma_export.targets.gguf.file import write_gguf

        write_gguf(job, folder / MODEL, progress)
        io = _graph(job.config.vocab_size)
        return Artifact(
            graphs={"prefill": (io,), "decode": (io,)},
            caches=self.caches(job.config, job.geometry),
            cache_dtype="float16",
            runtime=Runtime(
                self.name,
                "llama.cpp",
                ("llama-cpp-python",),
                FAMILIES[job.config.family].gguf.since,
            ),
            tools=("gguf", "torch"),
        )


def _graph(vocab_size: int) -> Graph:
    """llama.cpp's interface: tokens and positions in, logits out for each requested token."""
    return Graph(
        file=MODEL,
        inputs=(
            TensorSpec("tokens", "int32", ("tokens",), TensorRole.TOKENS, None, None),
            TensorSpec("positions", "int32", ("tokens",), TensorRole.POSITIONS, None, None),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("wanted", vocab_size), TensorRole.LOGITS, None, None),
        ),
        states=(),
    )
