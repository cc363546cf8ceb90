"""The ExecuTorch target: one `.pte` with XNNPACK delegates, for the stock LLM runners."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gemma_export.config import GemmaConfig, cache_layout
from gemma_export.quantize.recipe import Format
from gemma_export.targets import Artifact, ExportJob, Geometry
from gemma_runtime.errors import MissingExtra, TargetError
from gemma_runtime.manifest import Graph, LayerCache, TensorSpec
from gemma_runtime.manifest import Target as Runtime
from gemma_runtime.quiet import quiet

MODEL = "model.pte"
_MIN_RUNTIME = "1.5.0"  # the oldest that was tried


@dataclass(frozen=True, slots=True)
class ExecutorchTarget:
    name: str = "executorch"

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """A ring of window + prefill - 1 slots: a chunk evicts nothing its first token needs."""
        slack = None if geometry.full_cache else geometry.prefill_length - 1
        return cache_layout(config, geometry.context_length, slack)

    def check(self, formats: Mapping[str, Format]) -> None:
        """XNNPACK multiplies int4 in symmetric groups of 32 n, and float32."""
        if find_spec("executorch") is None:
            raise MissingExtra("executorch", "executorch")
        for name, form in formats.items():
            is_int4 = form.bits == 4 and not form.asymmetric and form.group % 32 == 0
            if not (is_int4 or form.is_float):
                raise TargetError(
                    f"XNNPACK has no kernel for {form}, which {name} would be; executorch takes "
                    "int4 in symmetric groups of 32, 64, … and float32: --quant int4 or none"
                )

    def write(self, job: ExportJob, folder: Path, progress: Callable[[str, int], None]) -> Artifact:
        caches = self.caches(job.config, job.geometry)
        with quiet():
            from gemma_export.targets.executorch_program import write_program

            write_program(job, caches, folder / MODEL, progress)
        io = _graph(job.config.vocab_size)
        is_exact = all(form.is_float for form in job.store.formats.values())
        return Artifact(
            graphs={"prefill": io, "decode": io, **({"exact": io} if is_exact else {})},
            caches=caches,
            cache_dtype="float32",
            runtime=Runtime(self.name, "executorch", _MIN_RUNTIME),
            tools=("executorch", "torch"),
        )


def _graph(vocab_size: int) -> Graph:
    """The caches are inside: no runner passes them."""
    return Graph(
        file=MODEL,
        inputs=(
            TensorSpec("tokens", "int64", (1, "tokens")),
            TensorSpec("start", "int64", (1,)),
        ),
        outputs=(TensorSpec("logits", "float32", (1, 1, vocab_size)),),
        states=(),
    )
