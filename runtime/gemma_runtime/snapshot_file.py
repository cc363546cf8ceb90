"""Files of snapshots: safetensors whose metadata says what the numbers depend on.

A file is not trusted: names, types, shapes and digests are checked, and nothing in it is run.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from gemma_runtime.backend_table import BACKENDS
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BakedError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.formats.safetensors import TensorInfo, lay_out, read_safetensors_header
from gemma_runtime.machine import package_version, processor_features, processor_name
from gemma_runtime.snapshot import Array, Snapshot
from gemma_runtime.staging import staged_file

FORMAT = 1
_ABOUT, _TOKENS = "snapshot", "tokens"
_DTYPES = {"F32": "float32", "F16": "float16", "I32": "int32", "I8": "int8", "U8": "uint8"}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Maker:
    """What the numbers of a snapshot depend on."""

    bundle: str  # `Bundle.digest`, which covers weights, codes, tokenizer and chat template
    model: str
    recipe: str
    target: str
    runtimes: dict[str, str | None]  # package -> version; None: not installed
    system: str
    processor: str
    features: list[str]  # of the processor


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    snapshot: Snapshot  # its caches are read from the file when they are asked for
    maker: Maker
    notes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _About:
    format: int
    maker: Maker
    written: int
    graph: str
    digests: dict[str, str]  # tensor -> sha256 of its bytes


@dataclass(frozen=True, slots=True)
class _Format:
    format: int


def describe_maker(bundle: Bundle) -> Maker:
    """What numbers computed here, with this bundle, depend on."""
    manifest = bundle.manifest
    backend = BACKENDS.get(manifest.target.name)
    packages = {*manifest.target.packages, *(backend.computes_with if backend else ())}
    release = platform.mac_ver()[0]  # on macOS, Core ML is part of the system
    return Maker(
        bundle=bundle.digest(),
        model=manifest.model.id,
        recipe=manifest.quantization.recipe,
        target=manifest.target.name,
        runtimes={name: package_version(name) for name in sorted({*packages, "gemma-export"})},
        system=" ".join(filter(None, (platform.system(), release, platform.machine()))),
        processor=processor_name(),
        features=processor_features(),
    )


def write_snapshot(
    path: Path, snapshot: Snapshot, maker: Maker, notes: Mapping[str, str], force: bool = False
) -> None:
    """Write a file that appears whole or not at all. Raises BakedError if it exists or can't be."""
    tensors = {_TOKENS: np.array(snapshot.tokens, np.int32), **snapshot.caches}
    digests = {name: _digest(array) for name, array in tensors.items()}
    about = _About(FORMAT, maker, snapshot.written, snapshot.graph, digests)
    layout = {name: TensorInfo(_NAMES[a.dtype.name], a.shape) for name, a in tensors.items()}
    metadata = {_ABOUT: msgspec.json.encode(about).decode(), **notes}
    _, header = lay_out(layout, metadata)
    if path.exists() and not force:
        raise BakedError(f"{path} exists; give another file, or --force to replace it")
    try:
        with staged_file(path) as partial, partial.open("wb") as file:
            file.write(header)
            for array in tensors.values():
                file.write(array.tobytes())
    except OSError as error:
        raise BakedError(f"can't write {path}: {error.strerror or error}") from error


def open_snapshot(path: Path) -> StoredSnapshot:
    """Read and check all but the caches. Raises BakedError if it is no snapshot's file."""
    try:
        tensors, notes = read_safetensors_header(path)
    except OSError as error:
        raise BakedError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BakedError(f"{path} {error}; bake it again") from error
    about = _read_about(path, notes.pop(_ABOUT, None))
    if tensors.keys() != about.digests.keys() or _TOKENS not in tensors:
        raise BakedError(f"{path} has other tensors than it says; bake it again")
    stored = _StoredArrays(path, tensors, about.digests)
    tokens = stored[_TOKENS]
    if tokens.dtype != np.int32 or tokens.ndim != 1:
        raise BakedError(f"{path} has no list of tokens; bake it again")
    ids = tuple(int(token) for token in tokens)
    snapshot = Snapshot(ids, about.written, about.graph, stored.without(_TOKENS))
    return StoredSnapshot(snapshot, about.maker, notes)


def check_maker(path: Path, made: Maker, bundle: Bundle) -> None:
    """Raise BakedError unless a snapshot's numbers are those that this bundle gives here."""
    here = describe_maker(bundle)
    if made.bundle != here.bundle:
        raise BakedError(
            f"{path} is of another bundle ({_named(made)}), this one is {_named(here)}; bake it "
            "again with this bundle"
        )
    for package in sorted({*made.runtimes, *here.runtimes}):
        told, found = made.runtimes.get(package), here.runtimes.get(package)
        if told != found:
            raise BakedError(
                f"{path} was made with {package} {told or '(none)'}, here is {found or 'none'}, "
                "which may round differently; bake it again"
            )
    machines = [(maker.system, maker.processor, maker.features) for maker in (made, here)]
    if machines[0] != machines[1]:
        raise BakedError(
            f"{path} was made on {made.system}, {made.processor}, here is {here.system}, "
            f"{here.processor}, or their instruction sets differ, so numbers may too; bake it again"
        )


class _StoredArrays(Mapping[str, Array]):
    """The tensors of a file. Each is read, and compared with its digest, when it is asked for."""

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]
    ) -> None:
        self._path, self._tensors, self._digests = path, tensors, digests

    def __getitem__(self, name: str) -> Array:
        info = self._tensors[name]
        if info.dtype not in _DTYPES:
            raise BakedError(f"{self._path}: {name} is {info.dtype}; bake it again")
        try:
            with self._path.open("rb") as file:
                file.seek(info.offset)
                content = file.read(info.bytes)
        except OSError as error:
            raise BakedError(f"can't read {self._path}: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != self._digests[name]:
            raise BakedError(f"{self._path} was altered: {name} has another sha256; bake it again")
        return np.frombuffer(content, _DTYPES[info.dtype]).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def without(self, name: str) -> "_StoredArrays":
        kept = {key: info for key, info in self._tensors.items() if key != name}
        return _StoredArrays(self._path, kept, self._digests)


def _read_about(path: Path, text: str | None) -> _About:
    if text is None:
        raise BakedError(f"{path} is not a baked prefix; expected a file of gemma-runtime bake")
    try:
        found = decode_json(text, _Format).format
        if found != FORMAT:
            raise BakedError(f"{path} has format {found}, expected {FORMAT}; bake it again")
        return decode_json(text, _About)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise BakedError(f"{path} is not a baked prefix: {error}; bake it again") from error


def _digest(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _named(maker: Maker) -> str:
    return f"{maker.model} {maker.recipe} for {maker.target}, digest {maker.bundle[:12]}…"
