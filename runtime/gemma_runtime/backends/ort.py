"""ONNX bundles on ONNX Runtime.

Past and present caches are bound to the same buffers, so a step copies no cache. T new tokens,
V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gemma_runtime.backends.chunked_session import ChunkedSession
from gemma_runtime.backends.huge_pages import use_huge_pages
from gemma_runtime.backends.packed import find_packed
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.manifest import Graph, LayerCache, Manifest, TensorRole, TensorSpec
from gemma_runtime.session import Logits, check_runtime
from gemma_runtime.snapshot import Array

if TYPE_CHECKING:
    import onnxruntime as ort


def open_ort_session(bundle: Bundle, threads: int | None, graph: str) -> "OrtSession":
    """Load one of the bundle's graphs. Raises SessionError if onnxruntime is too old."""
    import onnxruntime as ort

    check_runtime("onnxruntime", ort.__version__, bundle.manifest.target.min_runtime_version)
    io = bundle.manifest.graph(graph)
    packed = find_packed(bundle, graph)
    if packed is None:
        raw = load_model(bundle.directory / io.file, threads)
    else:
        raw = load_model(packed, threads, is_packed=True)
    session = OrtSession(raw, bundle.manifest, io)
    use_huge_pages()
    return session


def profile_ort(
    bundle: Bundle, threads: int | None, chunks: Sequence[Sequence[int]]
) -> list[list[tuple[str, float]]]:
    """Operators and their seconds for each chunk, from onnxruntime's trace."""
    io = bundle.manifest.graph("decode")
    with TemporaryDirectory() as folder:
        raw = load_model(bundle.directory / io.file, threads, profile=str(Path(folder) / "trace"))
        with OrtSession(raw, bundle.manifest, io) as session:
            for chunk in chunks:
                session.prefill(chunk)
            trace = msgspec.json.decode(Path(raw.end_profiling()).read_bytes(), type=list[_Event])
    ends = [event.ts + event.dur for event in trace if event.name == "model_run"]
    calls: list[list[tuple[str, float]]] = [[] for _ in ends]
    for event in trace:
        if event.name.endswith("_kernel_time"):
            calls[bisect_left(ends, event.ts)].append((event.args["op_name"], event.dur / 1e6))
    return calls


@dataclass(frozen=True, slots=True)
class _Event:
    """An event of Chrome's trace format; times in microseconds."""

    name: str
    ts: int
    dur: int = 0
    args: dict[str, Any] = field(default_factory=dict)


class OrtSession(ChunkedSession):
    def __init__(self, session: "ort.InferenceSession", manifest: Manifest, io: Graph) -> None:
        super().__init__(manifest)
        self._session = session
        self._binding = session.io_binding()
        self._bound = _BoundCaches(self._binding, io)
        self._file = io.file
        self._inputs = _Inputs(self._binding, io)
        self._output = io.tensor(TensorRole.LOGITS).name
        self._logits = np.empty((1, manifest.vocab_size), np.float32)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._admit(tokens)
        for chunk in self._chunks(tokens):
            self._run(chunk, range(len(chunk) - 1, len(chunk)), self._logits)
        logits: Logits = self._logits[0].copy()  # (V,)
        return logits

    def score(self, tokens: Sequence[int]) -> Logits:
        self._admit(tokens)
        logits = np.empty((len(tokens), self._manifest.vocab_size), np.float32)
        done = 0
        for chunk in self._scored_chunks(tokens):
            self._run(chunk, range(len(chunk)), logits[done : done + len(chunk)])
            done += len(chunk)
        return logits  # (T, V)

    def _scored_chunks(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Chunks after which each shared ring still holds what all of their tokens attend to.

        The layer that owns a ring reads it before it drops tokens; one that shares it reads it
        afterwards. A ring that has just been filled holds the window of every token since the time
        before, so chunks end there.
        """
        layers, context = self._manifest.layers, self.context_length
        shared = [one for one in layers if one.source is not None and one.slots < context]
        start, before = 0, self.position
        while start < len(tokens):
            stop = start + self._manifest.prefill_length
            for ring in shared:
                stop = min(stop, _next_full(ring, before + start) - before)
            yield tokens[start:stop]
            start = stop

    def close(self) -> None:
        del self._inputs, self._binding, self._bound, self._session

    def _holds(self, position: int, written: int) -> bool:
        layers = self._manifest.layers
        return all(_first_held(layer, position) == _first_held(layer, written) for layer in layers)

    @property
    def _caches(self) -> "_BoundCaches":
        return self._bound

    @property
    def _graph(self) -> str:
        return self._file

    def _run(self, chunk: Sequence[int], wanted: Sequence[int], logits: Logits) -> None:
        """Run the graph once; writes the logits of the wanted positions into `logits`."""
        total = self.position + len(chunk)
        self._inputs.set(TensorRole.TOKENS, np.array([chunk]))
        self._inputs.set(TensorRole.TOTAL, np.array(total, np.int32))
        self._inputs.set(TensorRole.WANTED, np.array(wanted))
        shape = (1, *logits.shape)
        self._binding.bind_output(self._output, "cpu", 0, np.float32, shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no type of their own
            raise SessionError(f"onnxruntime can't run {self._file}: {error}") from error
        self._tokens += chunk


class _BoundCaches:
    """One buffer per cache, bound as both input and output."""

    def __init__(self, binding: "ort.IOBinding", io: Graph) -> None:
        import onnxruntime as ort

        self.specs: dict[str, TensorSpec] = {}
        self._arrays: dict[str, Array] = {}
        self._values = []
        for state, returned in io.returned_caches():
            array = np.zeros([int(size) for size in state.shape], state.dtype)
            value = ort.OrtValue.ortvalue_from_numpy(array, "cpu")  # the array's own memory
            binding.bind_ortvalue_input(state.name, value)
            binding.bind_ortvalue_output(returned.name, value)
            self.specs[state.name], self._arrays[state.name] = state, array
            self._values.append(value)

    def read(self, name: str, rows: int | None = None) -> Array:
        return self._arrays[name][..., :rows, :].copy()

    def write(self, name: str, value: Array) -> None:
        self._arrays[name][..., : value.shape[-2], :] = value


class _Inputs:
    """Arrays bound as inputs. Rebinds only when a shape changes, so never while decoding."""

    def __init__(self, binding: "ort.IOBinding", io: Graph) -> None:
        self._binding = binding
        self._io = io
        self._bound: dict[TensorRole, NDArray[np.generic]] = {}

    def set(self, role: TensorRole, value: NDArray[np.generic]) -> None:
        held = self._bound.get(role)
        if held is not None and held.shape == value.shape:
            held[...] = value
            return
        import onnxruntime as ort

        self._bound[role] = value
        # The graph reads the array's own memory.
        bound = ort.OrtValue.ortvalue_from_numpy(value, "cpu")
        self._binding.bind_ortvalue_input(self._io.tensor(role).name, bound)


def load_model(
    path: Path, threads: int | None, *, profile: str | None = None, is_packed: bool = False
) -> "ort.InferenceSession":
    """Load a graph, or a packed model. Raises SessionError."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if is_packed:  # it was optimized when it was packed
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no type of their own
        reason = str(error).splitlines()[0]
        raise SessionError(f"onnxruntime {ort.__version__} can't load {path}: {reason}") from error


def _first_held(layer: LayerCache, total: int) -> int:
    """The first position that a cache holds after `total` tokens; it lies in slot 0.

    A full cache drops its first slots - window + 1 tokens, so that the rest moves to the front:
    GroupQueryAttention's rule for caches shorter than the context (onnxruntime, pull request
    32419). So two totals with the same first position differ in nothing before the smaller one.
    """
    if layer.window is None or total <= layer.slots:
        return 0
    step = layer.ring_step
    return -(-(total - layer.slots) // step) * step


def _next_full(layer: LayerCache, total: int) -> int:
    """The next number of tokens, above `total`, that fills all slots."""
    step = layer.ring_step
    return layer.slots + max(0, (total - layer.slots) // step + 1) * step
