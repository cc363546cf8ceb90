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

from gemma_runtime.backends.huge_pages import use_huge_pages
from gemma_runtime.backends.packed import find_packed, map_packed
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.manifest import AttentionKind, Graph, LayerCache, Manifest, TensorRole
from gemma_runtime.marks import CacheCopy
from gemma_runtime.session import ChunkedSession, Logits, check_runtime

if TYPE_CHECKING:
    import onnxruntime as ort


def open_ort_session(bundle: Bundle, threads: int | None, graph: str) -> "OrtSession":
    """Load one of the bundle's graphs. Raises SessionError if onnxruntime is too old."""
    import onnxruntime as ort

    check_runtime("onnxruntime", ort.__version__, bundle.manifest.target.min_runtime_version)
    io = bundle.manifest.graph(graph)
    packed = find_packed(bundle, graph)
    path = packed or bundle.directory / io.file
    raw = _load(path, threads, is_packed=packed is not None)
    session = OrtSession(raw, bundle.manifest, io)
    use_huge_pages()
    return session


def profile_ort(
    bundle: Bundle, threads: int | None, chunks: Sequence[Sequence[int]]
) -> list[list[tuple[str, float]]]:
    """Operators and their seconds for each chunk, from onnxruntime's trace."""
    io = bundle.manifest.graph("decode")
    with TemporaryDirectory() as folder:
        raw = _load(bundle.directory / io.file, threads, profile=str(Path(folder) / "trace"))
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
        self._caches, self._local = _bind_caches(self._binding, io)
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
        del self._inputs, self._binding, self._caches, self._local, self._session

    def _holds(self, position: int, written: int) -> bool:
        layers = self._manifest.layers
        return all(_first_held(layer, position) == _first_held(layer, written) for layer in layers)

    def _copy_caches(self) -> CacheCopy:
        held = [cache.copy() for cache in self._local]

        def restore() -> None:
            for cache, copy in zip(self._local, held, strict=True):
                cache[...] = copy

        return CacheCopy(restore, self._written)

    def _run(self, chunk: Sequence[int], wanted: Sequence[int], logits: Logits) -> None:
        """Run the graph once; writes the logits of the wanted positions into `logits`."""
        total = self.position + len(chunk)
        self._inputs.set(TensorRole.TOKENS, np.array([chunk]))
        self._inputs.set(TensorRole.TOTAL, np.array(total, np.int32))
        self._inputs.set(TensorRole.WANTED, np.array(wanted))
        shape = (1, *logits.shape)
        self._binding.bind_output(self._output, "cpu", 0, np.float32, shape, logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self._tokens += chunk


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


def _load(
    path: Path, threads: int | None, *, profile: str | None = None, is_packed: bool = False
) -> "ort.InferenceSession":
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if is_packed:
        map_packed(options)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no type of their own
        reason = str(error).splitlines()[0]
        raise SessionError(f"onnxruntime {ort.__version__} can't load {path}: {reason}") from error


def _bind_caches(
    binding: "ort.IOBinding", io: Graph
) -> "tuple[list[ort.OrtValue], list[NDArray[np.generic]]]":
    """Bind one buffer per cache as both input and output; also returns the local layers' arrays."""
    import onnxruntime as ort

    caches, local = [], []
    for state, returned in io.returned_caches():
        array = np.zeros([int(size) for size in state.shape], state.dtype)
        value = ort.OrtValue.ortvalue_from_numpy(array, "cpu")  # the array's own memory
        binding.bind_ortvalue_input(state.name, value)
        binding.bind_ortvalue_output(returned.name, value)
        caches.append(value)
        if state.kind is AttentionKind.LOCAL:
            local.append(array)
    return caches, local


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
