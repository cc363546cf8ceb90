"""The GGUF target: the store's codes as Q4_0 and Q8_0 blocks, for llama.cpp and Ollama.

What llama.cpp does by itself and no key changes: it scales embeddings by sqrt(width) in float32,
where a bfloat16 Gemma rounds that number, and queries by the head size (27b: by width / heads).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.format import FLOAT, Format
from gemma_export.formats.gguf_header import ALIGNMENT, write_header
from gemma_export.model.config import GemmaConfig, cache_layout
from gemma_export.progress import Tick
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets import Artifact, ExportJob, Geometry, refuse_split
from gemma_export.targets.gguf.blocks import block_type, pack_blocks
from gemma_export.targets.gguf.metadata import model_metadata
from gemma_export.targets.gguf.vocabulary import gguf_vocabulary
from gemma_runtime.contents.gguf_names import gguf_name
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import Graph, LayerCache, TensorSpec
from gemma_runtime.manifest import Target as Runtime

MODEL = "model.gguf"
_MIN_RUNTIME = "b4875"  # llama.cpp's first build with Gemma 3


@dataclass(frozen=True, slots=True)
class GgufTarget:
    name: str = "gguf"
    splits_table: bool = False

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """llama.cpp keeps the window and one chunk (`n_ubatch`) of local layers."""
        slack = None if geometry.full_cache else geometry.prefill_length
        return cache_layout(config, geometry.context_length, slack)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """int4 and symmetric int8 in groups of 32 n, and float32."""
        refuse_split(self.name, formats)
        for name, form in formats.items():
            if block_type(form) is None:
                raise TargetError(
                    f"gguf takes int4 and symmetric int8 in groups of 32, 64, … and float32, not "
                    f"{form}, which {name} would be"
                )

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        metadata = model_metadata(job.checkpoint.id, job.config) | gguf_vocabulary(job.checkpoint)
        types = {name: _type(job, name) for name in job.store.shapes}
        infos = {gguf_name(n): (job.store.shapes[n], kind) for n, kind in types.items()}
        with (folder / MODEL).open("wb") as file:
            write_header(file, metadata, infos)
            for name in types:
                _write_tensor(file, job.store.weight(name), progress)
        io = _graph(job.config.vocab_size)
        return Artifact(
            graphs={"prefill": io, "decode": io},
            caches=self.caches(job.config, job.geometry),
            cache_dtype="float16",
            runtime=Runtime(self.name, "llama.cpp", _MIN_RUNTIME),
            tools=("gguf", "torch"),
        )


def _type(job: ExportJob, name: str) -> GGMLQuantizationType:
    kind = block_type(job.store.formats.get(name, FLOAT))
    assert kind is not None, name  # `check` has seen to it
    return kind


def _write_tensor(file: BinaryIO, weight: StoredWeight, progress: Tick) -> None:
    for span in row_blocks(weight.shape):
        data = _block_rows(weight, *span).contiguous().view(torch.uint8).numpy()
        file.write(data.data)
        progress(weight.name, data.nbytes)
    file.write(bytes(-file.tell() % ALIGNMENT))


def _block_rows(weight: StoredWeight, start: int, stop: int) -> Tensor:
    if not weight.format.is_float:
        return pack_blocks(weight.name, weight.codes(start, stop), weight.format)
    rows = weight.rows(start, stop)
    return 1 + rows if len(weight.shape) == 1 else rows  # llama.cpp keeps gains as 1 + w


def _graph(vocab_size: int) -> Graph:
    """llama.cpp's own: tokens and their places in, one row of logits for each that asks."""
    return Graph(
        file=MODEL,
        inputs=(
            TensorSpec("tokens", "int32", ("tokens",)),
            TensorSpec("positions", "int32", ("tokens",)),
        ),
        outputs=(TensorSpec("logits", "float32", ("wanted", vocab_size)),),
        states=(),
    )
