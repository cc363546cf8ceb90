"""Stores the float32 teacher's top probabilities for a text, in a file small enough to ship.

T positions, k top tokens. The file is a numpy `.npz` with all segments concatenated.
"""

import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import BundleError

TEACHER = "teacher.npz"
TOP = 256  # tokens kept per position


@dataclass(frozen=True, slots=True)
class TeacherSegment:
    """One text with the teacher's k most likely next tokens after each of its tokens."""

    name: str
    tokens: NDArray[np.int32]  # (T,), bos first
    ids: NDArray[np.int32]  # (T, k), most likely first
    log_probs: NDArray[np.float32]  # (T, k), of `ids`
    next_log_probs: NDArray[np.float32]  # (T - 1,), of the token that does follow


def save_teacher(path: Path, segments: list[TeacherSegment]) -> None:
    parts: dict[str, NDArray[np.generic]] = {
        "names": np.array([segment.name for segment in segments]),
        "lengths": np.array([len(segment.tokens) for segment in segments], np.int32),
        "tokens": np.concatenate([segment.tokens for segment in segments]),
        "ids": np.concatenate([segment.ids for segment in segments]),
        "log_probs": np.concatenate([segment.log_probs for segment in segments]),
        "next": np.concatenate([segment.next_log_probs for segment in segments]),
    }
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **parts)


def load_teacher(path: Path) -> dict[str, TeacherSegment]:
    """Segments by name, from a file of `save_teacher`. Raises BundleError if it is not one.

    Compressed files are refused: `save_teacher` writes none, and a small one can hold terabytes.
    """
    try:
        with path.open("rb") as raw:
            _check_stored(raw)
            with np.load(raw, allow_pickle=False) as file:
                parts = {name: file[name] for name in _DTYPES}
        _check_parts(parts)
        return {segment.name: segment for segment in _split_segments(parts)}
    except _FAULTS as error:
        raise BundleError(f"{path} is not a teacher file: {error}; export again") from error


# What zipfile and numpy raise for damaged files, besides ValueError.
_FAULTS = (
    *(OSError, EOFError, KeyError, MemoryError, NotImplementedError, OverflowError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zipfile.BadZipFile),
)
_DTYPES = {"names": "U", "lengths": "i", "tokens": "i", "ids": "i", "log_probs": "f", "next": "f"}


def _check_stored(raw: BinaryIO) -> None:
    size = raw.seek(0, os.SEEK_END)
    with zipfile.ZipFile(raw) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("it is compressed")
    if sum(part.file_size for part in parts) > size:
        raise ValueError("its parts are larger than it is")
    raw.seek(0)


def _check_parts(parts: Mapping[str, NDArray[np.generic]]) -> None:
    """Raise ValueError unless types, ranks and lengths belong together."""
    ranks = {"ids": 2, "log_probs": 2}
    for name, array in parts.items():
        if array.dtype.kind != _DTYPES[name] or array.ndim != ranks.get(name, 1):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    lengths, count = parts["lengths"], len(parts["tokens"])
    if len(lengths) and int(lengths.min()) < 1:
        raise ValueError("a segment is empty")
    expected = {"names": len(lengths), "ids": count, "log_probs": count}
    expected |= {"tokens": int(lengths.sum()), "next": count - len(lengths)}
    for name, length in expected.items():
        if len(parts[name]) != length:
            raise ValueError(f"{name} has {len(parts[name])} entries, expected {length}")
    if parts["ids"].shape != parts["log_probs"].shape:
        raise ValueError("ids and log_probs have other shapes")


def _split_segments(parts: Mapping[str, NDArray[np.generic]]) -> list[TeacherSegment]:
    ends = np.cumsum(parts["lengths"])
    segments = []
    for index, (name, end) in enumerate(zip(parts["names"].tolist(), ends.tolist(), strict=True)):
        start = end - int(parts["lengths"][index])
        segments.append(
            TeacherSegment(
                name=name,
                tokens=parts["tokens"][start:end].astype(np.int32),
                ids=parts["ids"][start:end].astype(np.int32),
                log_probs=parts["log_probs"][start:end].astype(np.float32),
                next_log_probs=parts["next"][start - index : end - index - 1].astype(np.float32),
            )
        )
    return segments
