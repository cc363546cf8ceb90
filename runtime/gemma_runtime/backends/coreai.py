"""Core AI bundles, by the runtime in Apple's wheel `coreai-core`: on Linux too, without torch."""

import asyncio
import atexit
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cache
from importlib import metadata
from pathlib import Path
from threading import Thread
from time import sleep
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gemma_runtime.backends.chunk_inputs import Array, ChunkInputs
from gemma_runtime.backends.embedding_table import open_tables
from gemma_runtime.backends.step_session import StepSession
from gemma_runtime.bundle import Bundle, sha256_file
from gemma_runtime.errors import MissingExtra, SessionError
from gemma_runtime.manifest import Graph, TensorSpec
from gemma_runtime.quiet import captured_stderr, quiet
from gemma_runtime.session import Logits
from gemma_runtime.snapshot import WholeCaches

if TYPE_CHECKING:
    from coreai.runtime import InferenceFunction, InferenceFunctionDescriptor, NDArray

_PACKAGE = "coreai-core"
_SETTLING_S = 0.25

T = TypeVar("T")


def open_coreai_session(bundle: Bundle, threads: int | None, graph: str) -> StepSession:
    """Load the bundle's asset. `threads` are the runtime's own affair.

    Raises SessionError for another version of the runtime, and for an asset that it can't load.
    """
    _check_version(bundle.manifest.target.min_runtime_version)
    program = bundle.directory / bundle.manifest.graph(graph).file
    _check_program(program)
    return StepSession(CoreaiEngine(program.parent, bundle), bundle.manifest)


class CoreaiEngine:
    """The asset's functions over one set of states, called from a thread with a loop of its own.

    The runtime is asynchronous, and its caller may be within a loop already, as in a notebook.
    """

    def __init__(self, asset: Path, bundle: Bundle) -> None:
        _settle_at_exit()
        self._manifest = bundle.manifest
        self._tables = open_tables(bundle, self._manifest.graph("decode"))
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._opened = AsyncExitStack()
        try:
            self._functions = self._wait(self._load(asset))
        except BaseException:
            self.close()
            raise
        self._states = self._empty_states()

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        name = "decode" if len(tokens) == 1 else "prefill"
        graph = self._manifest.graph(name)
        inputs = ChunkInputs(self._manifest, self._tables, tokens, position).of(graph)
        return self._wait(self._call(self._functions[name], inputs))

    @property
    def caches(self) -> "_States":
        return _States(self._states, self._manifest.graph("decode").states)

    def close(self) -> None:
        self._functions, self._states = {}, {}
        self._wait(self._opened.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _load(self, asset: Path) -> dict[str, "InferenceFunction"]:
        with quiet(), captured_stderr():
            from coreai.authoring import AIModelAsset

            try:
                opening = AIModelAsset.load(asset).executable()
                model = await self._opened.enter_async_context(opening)
                functions = {name: model.load_function(name) for name in self._manifest.graphs}
            except (RuntimeError, KeyError, OSError) as error:
                raise SessionError(
                    f"{_PACKAGE} {_installed()} can't load {asset}: {_first_line(error)}; copy or "
                    "export it again"
                ) from error
        for name, function in functions.items():
            _check_signature(asset, self._manifest.graph(name), function.desc)
        return functions

    async def _call(self, function: "InferenceFunction", inputs: dict[str, Array]) -> Logits:
        from coreai.runtime import NDArray

        given = {name: NDArray(value) for name, value in inputs.items()}
        (logits,) = (await function(given, state=self._states)).values()
        found: Logits = logits.numpy().reshape(-1).astype(np.float32)
        return found

    def _empty_states(self) -> dict[str, "NDArray"]:
        from coreai.runtime import NDArray

        return {
            state.name: NDArray(np.zeros([int(size) for size in state.shape], state.dtype))
            for state in self._manifest.graph("decode").states
        }

    def _wait(self, work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _States(WholeCaches):
    """The states of an asset, in the dictionary that its functions are called with."""

    def __init__(self, held: dict[str, "NDArray"], states: Sequence[TensorSpec]) -> None:
        super().__init__({spec.name: spec for spec in states})
        self._held = held

    def _get(self, name: str) -> Array:
        found: Array = self._held[name].numpy()
        return found

    def _put(self, name: str, whole: Array) -> None:
        from coreai.runtime import NDArray

        self._held[name] = NDArray(whole)


@cache
def _settle_at_exit() -> None:
    """The runtime's threads drop Python objects after a call has answered already.

    One that is late for it, when Python has ended, aborts the process.
    """
    atexit.register(sleep, _SETTLING_S)


def _check_version(written: str) -> None:
    """A beta promises nothing to the next one, so only the version that wrote an asset reads it."""
    found = _installed()
    if found != written:
        raise SessionError(
            f"{_PACKAGE} is {found}, and this bundle was written for {written}: both are betas; "
            f"run: pip install {_PACKAGE}=={written}, or export again"
        )


def _check_program(program: Path) -> None:
    """The asset's own digest: of bytes that it can't parse, the runtime ends the whole process."""
    digest = program.with_name("main.hash")
    try:
        told, found = digest.read_bytes().hex(), sha256_file(program)
    except OSError as error:
        raise SessionError(
            f"{error.filename} can't be read: {error.strerror}; copy or export it again"
        ) from error
    if told != found:
        raise SessionError(
            f"{program} was altered: its sha256 is {found[:12]}…, {digest.name} says "
            f"{told[:12]}…; copy or export it again"
        )


def _check_signature(asset: Path, graph: Graph, found: "InferenceFunctionDescriptor") -> None:
    """Names and shapes, which the runtime takes on trust."""
    parts = (
        (graph.inputs, found.input_names, found.input_descriptor),
        (graph.outputs, found.output_names, found.output_descriptor),
        (graph.states, found.state_names, found.state_descriptor),
    )
    for expected, names, describe in parts:
        shapes = {name: tuple(describe(name).shape) for name in names}
        if shapes != {spec.name: spec.shape for spec in expected}:
            raise SessionError(
                f"{asset}: {found.name} has {_shapes(shapes)}, and manifest.json says "
                f"{_shapes({spec.name: spec.shape for spec in expected})}; export it again"
            )


def _shapes(shapes: Mapping[str, tuple[object, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _installed() -> str:
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise MissingExtra(_PACKAGE, "coreai") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
