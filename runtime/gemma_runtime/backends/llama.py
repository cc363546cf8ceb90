"""GGUF bundles on llama.cpp, through llama-cpp-python's C bindings.

T new tokens, V vocabulary.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_runtime.backends.chunked_session import ChunkedSession
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import MissingExtra, SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.manifest import Manifest
from gemma_runtime.session import Logits
from gemma_runtime.snapshot import Array, Snapshot

_STATE = "state"


def open_llama_session(bundle: Bundle, threads: int | None, graph: str) -> "LlamaSession":
    """Load the bundle's GGUF file.

    Raises MissingExtra if llama.cpp is not installed, SessionError if it refuses the file.
    """
    path = bundle.directory / bundle.manifest.graph(graph).file
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise MissingExtra("llama-cpp-python", "llama") from error
    _silence(llama_cpp)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), _model_settings(llama_cpp))
    if not model:
        raise SessionError(
            f"llama.cpp {llama_cpp.__version__} can't load {path}; update llama-cpp-python"
        )
    return LlamaSession(llama_cpp, model, bundle.manifest, threads or physical_cores())


class LlamaSession(ChunkedSession):
    def __init__(self, library: Any, model: Any, manifest: Manifest, threads: int) -> None:
        super().__init__(manifest)
        self._library, self._model = library, model
        self._context = _make_context(library, model, manifest, threads)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._admit(tokens)
        for chunk in self._chunks(tokens):
            logits = self._run(chunk, wanted=1)
        last: Logits = logits[0]  # (V,)
        return last

    def score(self, tokens: Sequence[int]) -> Logits:
        self._admit(tokens)
        parts = [self._run(chunk, wanted=len(chunk)) for chunk in self._chunks(tokens)]
        return np.concatenate(parts)  # (T, V)

    def reset(self) -> None:
        self._library.llama_memory_clear(self._memory(), True)
        super().reset()

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _holds(self, position: int, written: int) -> bool:
        """Whether every token that the next one sees is there; llama.cpp says which it has dropped.

        Its caches hold the whole context (`swa_full`), so further tokens push none out.
        """
        first = self._library.llama_memory_seq_pos_min(self._memory(), 0)
        windows = [layer.window for layer in self._manifest.layers if layer.window is not None]
        return all(first <= max(0, position - window + 1) for window in windows)

    def _go_back(self, position: int) -> None:
        if not self._library.llama_memory_seq_rm(self._memory(), 0, position, -1):
            raise SessionError(f"llama.cpp can't remove the tokens from position {position} on")
        super()._go_back(position)

    def _read_caches(self) -> Mapping[str, Array]:
        """One array of bytes, in llama.cpp's own layout."""
        size = self._library.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        written = self._library.llama_state_seq_get_data(self._context, buffer, size, 0)
        if written != size:
            raise SessionError(f"llama.cpp saved {written} of {size} bytes of its caches")
        return {_STATE: np.frombuffer(buffer, np.uint8)}

    def _write_caches(self, snapshot: Snapshot) -> None:
        """llama.cpp checks the layout itself; here, that it took the tokens that it should.

        Of local layers it has saved only the last window, and puts it into the first cells. So
        with several threads, which share the cells out, single tokens then round differently.
        """
        data = snapshot.caches.get(_STATE)
        if data is None or data.dtype != np.uint8 or data.ndim != 1:
            raise SessionError("the snapshot is not one of llama.cpp; save it again")
        buffer = (ctypes.c_uint8 * data.size).from_buffer_copy(data.tobytes())
        taken = self._library.llama_state_seq_set_data(self._context, buffer, data.size, 0)
        count = len(snapshot.tokens)
        last = self._library.llama_memory_seq_pos_max(self._memory(), 0)
        if taken != data.size or last != count - 1 or not self._holds(count, snapshot.written):
            self.reset()
            raise SessionError("llama.cpp can't read the snapshot; save it again")

    def _memory(self) -> Any:
        return self._library.llama_get_memory(self._context)

    def _run(self, chunk: Sequence[int], wanted: int) -> Logits:
        """Append a chunk; returns the logits of its last `wanted` tokens, (wanted, V)."""
        library, count = self._library, len(chunk)
        batch = library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(chunk):
                batch.token[index], batch.pos[index] = token, self.position + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = index >= count - wanted
            if status := library.llama_decode(self._context, batch):
                raise SessionError(f"llama.cpp failed on {count} tokens with status {status}")
        finally:
            library.llama_batch_free(batch)
        self._tokens += chunk
        return np.stack([self._row(index) for index in range(count - wanted, count)])

    def _row(self, index: int) -> Logits:
        pointer = self._library.llama_get_logits_ith(self._context, index)
        row: Logits = np.ctypeslib.as_array(pointer, (self._manifest.vocab_size,)).copy()
        return row


def _model_settings(library: Any) -> Any:
    settings = library.llama_model_default_params()
    settings.n_gpu_layers = 0
    # Of the mapped table of per-layer embeddings, only the rows of the tokens are read. By itself,
    # llama.cpp does so above 4 GiB; older versions read the whole table.
    if hasattr(settings, "lazy_mode"):
        settings.lazy_mode = library.LLAMA_LAZY_MODE_ON
    return settings


def _make_context(library: Any, model: Any, manifest: Manifest, threads: int) -> Any:
    settings = library.llama_context_default_params()
    settings.n_ctx = manifest.context_length
    settings.n_batch = settings.n_ubatch = manifest.prefill_length
    settings.n_threads = settings.n_threads_batch = threads
    settings.swa_full = True
    context = library.llama_init_from_model(model, settings)
    if not context:
        library.llama_model_free(model)
        raise SessionError(f"llama.cpp can't create a context of {manifest.context_length} tokens")
    return context


def _silence(library: Any) -> None:
    """Keep llama.cpp's log off the terminal; the callback lives as long as the library."""
    if not hasattr(library, "_gemma_silence"):
        callback_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        library._gemma_silence = callback_type(lambda level, text, data: None)
        library.llama_log_set(library._gemma_silence, ctypes.c_void_p(0))
