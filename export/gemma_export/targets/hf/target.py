"""The Hugging Face target: a folder with the store's codes, for transformers and vLLM.

Its formats quantize linear layers. The embedding table, which is usually also the head, is stored
as float16, rounded from the dequantized codes; so is the table of per-layer embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig, cache_layout
from gemma_export.progress import Tick
from gemma_export.targets import Artifact, ExportJob, Geometry, refuse_split
from gemma_export.targets.hf import TARGET
from gemma_export.targets.hf.config import hf_config
from gemma_export.targets.hf.text import write_text_files
from gemma_export.targets.shared.tokenizer_files import write_json
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import Graph, LayerCache, TensorRole, TensorSpec
from gemma_runtime.manifest import Target as Runtime

MODEL = "model.safetensors"
# Not named *.safetensors: vLLM loads every such file of the folder.
TABLE_SCALES = "embed_tokens.scales"
_MIN_RUNTIME = "5.0"
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class HfTarget:
    name: ClassVar[str] = TARGET.name
    hf_format: str

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """transformers caches the window in local layers."""
        return cache_layout(config, geometry.context_length, None if geometry.full_cache else 0)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Accepts symmetric int4 and int8 whose groups fill 32-bit words, and float32."""
        refuse_split(self.name, formats)
        for name, fmt in formats.items():
            in_words = fmt.is_float or fmt.group * fmt.bits % _WORD_BITS == 0
            # transformers 5 can't load compressed-tensors' packed zero points unless told to
            # dequantize; vLLM's fast GPTQ kernels have none.
            if fmt.asymmetric or not in_words:
                raise TargetError(f"hf can't store {name} as {fmt}; it supports {TARGET.formats}")

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        from gemma_export.targets.hf.compressed import COMPRESSED
        from gemma_export.targets.hf.gptq import GPTQ
        from gemma_export.targets.hf.weights import LOOKED_UP, write_table_scales, write_weights

        packing = GPTQ if self.hf_format == "gptq" else COMPRESSED
        quantization = packing.config(job.store.formats)
        config = hf_config(job.config, quantization)
        write_json(folder / "config.json", config)
        write_text_files(job, folder)
        write_weights(job, folder / MODEL, packing, progress)
        roles = {}
        tables = [job.store.weight(name) for name in LOOKED_UP if name in job.store.shapes]
        if rounded := [table for table in tables if not table.format.is_float]:
            write_table_scales(rounded, folder / TABLE_SCALES)
            roles["table_scales"] = TABLE_SCALES
        packages = packing.packages if quantization else ("transformers",)
        io = _graph(job.config.vocab_size)
        return Artifact(
            graphs={"prefill": (io,), "decode": (io,)},
            caches=self.caches(job.config, job.geometry),
            cache_dtype="float32" if config["dtype"] == "float32" else "float16",  # or bfloat16
            runtime=Runtime(self.name, TARGET.label, packages, _MIN_RUNTIME),
            tools=("torch",),
            roles=roles,
        )


def _graph(vocab_size: int) -> Graph:
    """The model in transformers: token ids in, logits of every token out."""
    return Graph(
        file=MODEL,
        inputs=(TensorSpec("input_ids", "int64", ("tokens",), TensorRole.TOKENS, None, None),),
        outputs=(
            TensorSpec("logits", "float32", ("tokens", vocab_size), TensorRole.LOGITS, None, None),
        ),
        states=(),
    )
