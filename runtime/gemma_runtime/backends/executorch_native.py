"""Runs a `.pte` without torch, in a process of `native/gemma_native.cpp`, built on demand."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np

from gemma_runtime.cache import cache_folder, writable_cache
from gemma_runtime.errors import MissingExtra, SessionError
from gemma_runtime.manifest import TensorSpec
from gemma_runtime.session import Logits
from gemma_runtime.snapshot import Array, WholeCaches

_SOURCES = ("CMakeLists.txt", "gemma_native.cpp")
_BINARY = "gemma_native"
_READ_CACHE, _WRITE_CACHE = -1, -2  # requests


class NativeEngine:
    """Requests logits from the process; `serve` in gemma_native.cpp describes the protocol."""

    def __init__(self, path: Path, threads: int, states: Sequence[TensorSpec] = ()) -> None:
        self._states = states
        self._log = TemporaryFile()  # noqa: SIM115  closed with the process
        runner = build_native()
        try:
            self._process = subprocess.Popen(
                [runner, path, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        except OSError as error:
            self._log.close()
            raise SessionError(
                f"can't run {runner}: {error.strerror}; unset $GEMMA_NATIVE, or let it name a "
                "gemma_native that was built for this machine"
            ) from error

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        """Raises SessionError with the process's last error message if it has ended."""
        size = self._ask(np.array([len(tokens), position, *tokens]).tobytes())
        return np.frombuffer(self._answer(4 * size), np.float32).copy()  # (V,)

    @property
    def caches(self) -> "_Served | None":
        return _Served(self, self._states) if self._states else None

    def read_cache(self, name: str) -> bytes:
        return self._answer(self._ask(_cache_request(_READ_CACHE, name)))

    def write_cache(self, name: str, content: bytes) -> None:
        self._ask(_cache_request(_WRITE_CACHE, name) + content)

    def _ask(self, request: bytes) -> int:
        """Send a request; returns the number that its answer begins with, which is not 0."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        size = int(np.frombuffer(self._answer(8), np.int64)[0])
        if not size:
            raise self._ended()
        return size

    def _answer(self, count: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(count)
        if len(content) < count:
            raise self._ended()
        return content

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ended(self) -> SessionError:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        reason = told[-1].removeprefix("error: ") if told else f"exit code {code}"
        return SessionError(f"gemma_native ended: {reason}; copy or export the bundle again")


class _Served(WholeCaches):
    """The program's caches, which the process reads and writes."""

    def __init__(self, engine: NativeEngine, states: Sequence[TensorSpec]) -> None:
        super().__init__({spec.name: spec for spec in states})
        self._engine = engine

    def _get(self, name: str) -> Array:
        spec = self.specs[name]
        whole: Array = np.frombuffer(self._engine.read_cache(name), spec.dtype)
        return whole.reshape([int(size) for size in spec.shape])

    def _put(self, name: str, whole: Array) -> None:
        self._engine.write_cache(name, whole.tobytes())


def _cache_request(kind: int, name: str) -> bytes:
    return np.array([kind, len(name)]).tobytes() + name.encode("ascii")


def named_runner() -> Path | None:
    """The runner that $GEMMA_NATIVE names, for boards without a compiler."""
    name = os.environ.get("GEMMA_NATIVE")
    return Path(name) if name else None


def build_native() -> Path:
    """The runner that $GEMMA_NATIVE names, or one compiled for the installed executorch.

    It is compiled once and cached. Raises SessionError with the compiler's first error line, and
    MissingExtra without executorch.
    """
    if runner := named_runner():
        return runner
    source, wheel = _source_folder(), _executorch_folder()
    content = b"".join((source / name).read_bytes() for name in _SOURCES)
    key = hashlib.sha256(content + str(wheel).encode()).hexdigest()[:16]
    binary = cache_folder() / "native" / key / _BINARY
    if not binary.exists():
        writable_cache()
        binary.parent.mkdir(parents=True, exist_ok=True)
        _compile(source, wheel, binary)
    return binary


def _compile(source: Path, wheel: Path, binary: Path) -> None:
    cmake = shutil.which(
        "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), *_path()])
    )
    if cmake is None:
        raise SessionError("building the ExecuTorch runner needs cmake; run: pip install cmake")
    with TemporaryDirectory(dir=binary.parent) as folder:
        configure = ["-S", str(source), "-B", folder, f"-DCMAKE_PREFIX_PATH={wheel}"]
        for arguments in (configure, ["--build", folder]):
            done = subprocess.run([cmake, *arguments], capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
                raise SessionError(
                    f"can't build the ExecuTorch runner: {lines[0] if lines else cmake}"
                )
        (Path(folder) / _BINARY).replace(binary)


def _path() -> list[str]:
    return os.environ.get("PATH", os.defpath).split(os.pathsep)


def _source_folder() -> Path:
    """The folder of C++ sources: beside the package in a clone, inside it once installed."""
    package = Path(__file__).parents[1]
    places = (package.parent / "native", package / "native")
    return next(place for place in places if (place / _SOURCES[0]).exists())


def _executorch_folder() -> Path:
    found = find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra("executorch", "executorch")
    return Path(found.submodule_search_locations[0])
