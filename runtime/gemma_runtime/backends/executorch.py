"""ExecuTorch bundles, through executorch's Python runtime or through our native runner.

V vocabulary.
"""

from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING

from gemma_runtime.backends.executorch_native import NativeEngine, named_runner
from gemma_runtime.backends.step_session import StepSession
from gemma_runtime.backends.unlocked import unlocked
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import MissingExtra, SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.manifest import TensorSpec
from gemma_runtime.quiet import captured_stderr, quiet
from gemma_runtime.session import Logits, check_runtime
from gemma_runtime.snapshot import Array

if TYPE_CHECKING:
    from executorch.devtools.inspector import Event
    from executorch.runtime import Method


def open_executorch_session(bundle: Bundle, threads: int | None, graph: str) -> "StepSession":
    """Load the bundle's program: with executorch's Python runtime, or natively.

    Natively where torch is missing, and where $GEMMA_NATIVE names a runner.
    Raises SessionError for a runtime too old for it, and for a file it can't load.
    """
    check_runtime("executorch", _installed(), bundle.manifest.target.min_runtime_version)
    program = bundle.manifest.graph(graph)
    path, threads = bundle.directory / program.file, threads or physical_cores()
    if named_runner() or find_spec("torch") is None:
        engine = NativeEngine(path, threads, program.states)
        return StepSession(engine, bundle.manifest, runner="gemma_native")
    return StepSession(PythonEngine(path, threads, program.states), bundle.manifest)


def profile_executorch(
    bundle: Bundle, threads: int | None, chunks: Sequence[Sequence[int]]
) -> list[list[tuple[str, float]]]:
    """Operators and seconds of each chunk, by ETDump: XNNPACK's kernels and what is around them."""
    path = bundle.directory / bundle.manifest.graph("decode").file
    with quiet(), captured_stderr(), TemporaryDirectory() as folder:
        import torch  # noqa: TID251  the runtime takes and gives its tensors
        from executorch.devtools import Inspector
        from executorch.extension.pybindings import portable_lib

        import_module("executorch.kernels.quantized")
        portable_lib._unsafe_reset_threadpool(threads or physical_cores())
        module = portable_lib._load_for_executorch(str(path), enable_etdump=True)
        position = 0
        for chunk in chunks:
            module.run_method("forward", (torch.tensor([chunk]), torch.tensor([position])))
            position += len(chunk)
        dump = str(Path(folder) / "etdump")
        module.write_etdump_result_to_file(dump, "")
        events = Inspector(etdump_path=dump).event_blocks[-1].events
    return [_operators(events, call) for call in range(len(chunks))]


def _operators(events: "Sequence[Event]", call: int) -> list[tuple[str, float]]:
    """Kernels only: a delegate's call, and the whole, hold the time of others."""
    return [
        (_kernel(event.name), event.perf_data.raw[call] / 1e3)
        for event in events
        if event.perf_data is not None
        and (event.is_delegated_op or event.name.startswith("native_call_"))
    ]


def _kernel(name: str) -> str:
    """`Fully Connected (NC, F32) GEMM #3` and `native_call_add.out` without number and prefix."""
    return name.removeprefix("native_call_").partition(" #")[0]


class PythonEngine:
    """executorch's own Python runtime, whose tensors are torch's."""

    def __init__(self, path: Path, threads: int, states: Sequence[TensorSpec]) -> None:
        self._method = _load(path, threads)
        self._states = states

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        import torch  # noqa: TID251  the runtime takes and gives its tensors

        inputs = (torch.tensor([tokens]), torch.tensor([position]))
        (logits,) = self._method.execute(inputs)
        found: Logits = logits.numpy().reshape(-1).copy()
        return found

    @property
    def caches(self) -> "_Attributes | None":
        return _Attributes(self._method, self._states) if self._states else None

    def close(self) -> None:
        del self._method


class _Attributes:
    """The program's buffers by name: tensors over the program's own memory."""

    def __init__(self, method: "Method", states: Sequence[TensorSpec]) -> None:
        self.specs = {spec.name: spec for spec in states}
        self._method = method

    def read(self, name: str, rows: int | None = None) -> Array:
        return self._buffer(name)[..., :rows, :].copy()

    def write(self, name: str, value: Array) -> None:
        self._buffer(name)[..., : value.shape[-2], :] = value

    def _buffer(self, name: str) -> Array:
        # executorch's public wrapper of a method doesn't pass this on.
        found: Array = self._method._method.get_attribute(name).numpy()
        return found


def _installed() -> str:
    try:
        return metadata.version("executorch")
    except metadata.PackageNotFoundError as error:
        raise MissingExtra("executorch", "executorch") from error


def _load(path: Path, threads: int) -> "Method":
    with quiet(), captured_stderr() as log:
        import_module("executorch.kernels.quantized")  # registers the lookup of int4 tokens
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime, Verification

        _unsafe_reset_threadpool(threads)
        try:
            with unlocked(path):
                program = Runtime.get().load_program(
                    path, verification=Verification.InternalConsistency
                )
                return program.load_method("forward")
        except RuntimeError as error:
            raise SessionError(
                f"executorch {_installed()} can't load {path}: {_reason(log, error)}; copy or "
                "export it again"
            ) from error


def _reason(log: IO[bytes], error: RuntimeError) -> str:
    """The runtime's own last words: its exception holds a number only."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    told = [line.partition("] ")[2] for line in lines if "cpuinfo" not in line]
    named = [line for line in told if line.startswith("Missing operator")]
    return (named or told or [str(error)])[-1]
