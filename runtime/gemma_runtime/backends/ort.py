"""ONNX bundles on ONNX Runtime: one session, caches bound in place.

Past and present caches are the same buffers, so a step copies no cache. T new tokens, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
import psutil

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.manifest import Manifest
from gemma_runtime.session import Logits, check_room, check_tokens


def open_ort_session(bundle: Bundle, threads: int | None = None) -> "OrtSession":
    """Load the bundle's graph. Raises SessionError for a runtime older than the bundle needs."""
    _check_version(bundle.manifest.target.min_runtime_version)
    path = bundle.directory / bundle.manifest.graphs["decode"].file
    return OrtSession(_load(path, threads), bundle.manifest)


class OrtSession:
    def __init__(self, session: ort.InferenceSession, manifest: Manifest) -> None:
        self._session = session
        self._manifest = manifest
        self._position = 0
        self._binding = session.io_binding()
        self._caches = _bind_caches(self._binding, manifest)
        self._logits = _empty(np.dtype(np.float32), (1, 1, manifest.vocab_size))

    @property
    def position(self) -> int:
        return self._position

    @property
    def context_length(self) -> int:
        return self._manifest.context_length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        for chunk in self._chunks(tokens):
            self._run(chunk, np.array([len(chunk) - 1]), self._logits)
        return self._last_logits()

    def decode(self, token: int) -> Logits:
        self._check([token])
        self._run([token], np.zeros(1, np.int64), self._logits)
        return self._last_logits()

    def score(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        rows = []
        for chunk in self._chunks(tokens):
            logits = _empty(np.dtype(np.float32), (1, len(chunk), self._manifest.vocab_size))
            self._run(chunk, np.arange(len(chunk)), logits)
            rows.append(logits.numpy()[0])
        return np.concatenate(rows)  # (T, V)

    def reset(self) -> None:
        # Slots past the position are never read, so nothing has to be cleared.
        self._position = 0

    def close(self) -> None:
        del self._binding, self._caches, self._logits, self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, tokens: Sequence[int]) -> None:
        check_tokens(tokens, self._manifest.vocab_size)
        check_room(self._position, len(tokens), self.context_length)

    def _chunks(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        step = self._manifest.prefill_length
        return [tokens[i : i + step] for i in range(0, len(tokens), step)]

    def _run(self, chunk: Sequence[int], wanted: np.ndarray, logits: ort.OrtValue) -> None:
        total = self._position + len(chunk)
        self._binding.bind_cpu_input("tokens", np.array([chunk], np.int64))
        self._binding.bind_cpu_input("total", np.array(total, np.int32))
        self._binding.bind_cpu_input("wanted", wanted)
        self._binding.bind_ortvalue_output("logits", logits)
        self._session.run_with_iobinding(self._binding)
        self._position = total

    def _last_logits(self) -> Logits:
        logits: Logits = self._logits.numpy()[0, 0].copy()  # (V,)
        return logits


def _load(path: Path, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or psutil.cpu_count(logical=False) or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common type of their own
        reason = str(error).splitlines()[0]
        raise SessionError(f"onnxruntime {ort.__version__} can't load {path}: {reason}") from error


def _bind_caches(binding: ort.IOBinding, manifest: Manifest) -> list[ort.OrtValue]:
    """One buffer per cache, as input and as output."""
    caches = []
    for state in manifest.graphs["decode"].states:
        value = _empty(np.dtype(state.dtype), tuple(int(n) for n in state.shape))
        binding.bind_ortvalue_input(state.name, value)
        binding.bind_ortvalue_output(state.name.replace("past", "present"), value)
        caches.append(value)
    return caches


def _empty(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cpu")


def _check_version(minimum: str) -> None:
    if _version(ort.__version__) < _version(minimum):
        raise SessionError(
            f"onnxruntime {ort.__version__} would give wrong tokens, this bundle needs {minimum}; "
            "run: pip install -U onnxruntime"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())
