"""The ExecuTorch target: one `.pte` with XNNPACK delegates, for the stock LLM runners."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig, cache_layout
from gemma_export.progress import Tick
from gemma_export.targets import Artifact, ExportJob, Geometry, refuse_split
from gemma_export.targets.executorch import TARGET
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import Graph, LayerCache, TensorRole, TensorSpec
from gemma_runtime.manifest import Target as Runtime
from gemma_runtime.quiet import quiet

MODEL = "model.pte"
_MIN_RUNTIME = "1.5.0"  # the oldest version that was tested


@dataclass(frozen=True, slots=True)
class ExecutorchTarget:
    name: ClassVar[str] = TARGET.name
    delegate: str

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """Rings of window + prefill - 1 slots, so a chunk evicts nothing that its tokens need."""
        if self.delegate != "xnnpack" and config.irregular:
            raise TargetError(
                f"--delegate {self.delegate} can't compute this model's "
                f"{', '.join(config.irregular)} yet; leave --delegate out, for xnnpack"
            )
        slack = None if geometry.full_cache else geometry.prefill_length - 1
        return cache_layout(config, geometry.context_length, slack)

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Accepts float32; except for vulkan, int4 in symmetric groups of 32 n; for xnnpack, int8.

        Int8 has one symmetric scale per channel.
        """
        refuse_split(self.name, formats)
        if self.delegate == "coreml" and geometry.prefill_length != 1:
            raise TargetError(
                "executorch's Core ML delegate needs fixed shapes, here one token per call; add "
                "--prefill 1"
            )
        for name, fmt in formats.items():
            is_int4 = fmt.bits == 4 and not fmt.asymmetric and fmt.group % 32 == 0
            is_int8 = fmt.bits == 8 and not fmt.asymmetric and fmt.per_channel
            takes_int4 = self.delegate != "vulkan"  # lowering it fails in executorch 1.5.1
            takes_int8 = self.delegate == "xnnpack"
            if not (fmt.is_float or (is_int4 and takes_int4) or (is_int8 and takes_int8)):
                recipes = ["int4"] * takes_int4 + ["int8-channel"] * takes_int8 + ["none"]
                raise TargetError(
                    f"{self.delegate} has no kernel for {name} as {fmt}; choose --quant "
                    f"{' or '.join(recipes)} for executorch alone, or another target"
                )

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        caches = self.caches(job.config, job.geometry)
        with quiet():
            from gemma_export.targets.executorch.program import write_program, write_traced

            if self.delegate == "xnnpack":
                write_program(job, caches, folder / MODEL, progress)
            else:
                write_traced(job, caches, folder / MODEL, self.delegate)
        # Other delegates may take the caches into themselves.
        states = tuple(_states(caches)) if self.delegate == "xnnpack" else ()
        io = (_graph(job.config.vocab_size, states),)
        is_exact = all(fmt.is_float for fmt in job.store.formats.values())
        return Artifact(
            graphs={"prefill": io, "decode": io, **({"exact": io} if is_exact else {})},
            caches=caches,
            cache_dtype="float32",
            runtime=Runtime(self.name, "ExecuTorch", ("executorch",), _MIN_RUNTIME),
            tools=("executorch", "torch"),
        )


def _graph(vocab_size: int, states: tuple[TensorSpec, ...]) -> Graph:
    """Inputs and outputs of the program. It contains the caches, so runners don't pass them."""
    return Graph(
        file=MODEL,
        inputs=(
            TensorSpec("tokens", "int64", (1, "tokens"), TensorRole.TOKENS, None, None),
            TensorSpec("start", "int64", (1,), TensorRole.START, None, None),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, 1, vocab_size), TensorRole.LOGITS, None, None),
        ),
        states=states,
    )


def _states(caches: tuple[LayerCache, ...]) -> Iterator[TensorSpec]:
    """The program's buffers that hold the caches, by the names in its frame."""
    for index, cache in enumerate(caches):
        if cache.source is not None:
            continue
        for part, role in (("key", TensorRole.KEYS), ("value", TensorRole.VALUES)):
            yield TensorSpec(f"{part}_{index}", "float32", cache.shape[1:], role, cache.kind, index)
