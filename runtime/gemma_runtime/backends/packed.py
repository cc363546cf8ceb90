"""Packed weights of ONNX bundles, kept in the cache folder.

When onnxruntime loads a model, it copies matrices into the layout of its kernels, in memory that no
file backs. `pack_weights` saves these copies with the model instead, and later sessions map them:
the same bytes in the same kernels, but the system may drop them and read them again.

onnxruntime 1.32 still packs each matrix while it loads, to find its copy by a hash. So a copy that
doesn't belong to this processor is never used, loading is no faster, and the file holds the
original weights too.
"""

import hashlib
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from packaging.version import Version

from gemma_runtime.bundle import Bundle
from gemma_runtime.cache import ABOUT, PACKED, About, cache_folder, writable_cache
from gemma_runtime.errors import SessionError
from gemma_runtime.machine import format_bytes, processor_features, processor_name
from gemma_runtime.staging import sweep_leftovers

if TYPE_CHECKING:
    from gemma_runtime.session import Logits

_MODEL, _DATA = "model.onnx", "model.onnx.data"
_MOST_TIMES = 4  # the packed file is at most so many times as large as the stored weights
_DECODE = "decode"  # the graph that is packed
_OLDEST = "1.32"  # 1.29 to 1.31 gave wrong logits with packed weights
_CHECKED = 16  # tokens whose logits have to be the same


@dataclass(frozen=True, slots=True)
class PackedWeights:
    path: str  # a folder of the cache
    bytes: int
    stored_bytes: int  # of the bundle's own weights


def pack_weights(bundle: Bundle) -> PackedWeights:
    """Save the bundle's weights as this machine's kernels read them; does nothing if they are.

    Raises SessionError for bundles of other targets and older versions of onnxruntime, if the disk
    has too little room, and if the packed model gives other logits than the bundle.
    """
    if bundle.manifest.target.name != "onnx":
        raise SessionError(
            f"{bundle.directory} is for {bundle.manifest.target.name}; only weights of ONNX "
            "bundles are packed"
        )
    import onnxruntime as ort

    if Version(ort.__version__) < Version(_OLDEST):
        raise SessionError(
            f"onnxruntime {ort.__version__} reads packed weights wrongly; run: pip install -U "
            f"'onnxruntime>={_OLDEST}'"
        )
    model = bundle.directory / bundle.manifest.graph(_DECODE).file
    stored = sum(f.bytes for name, f in bundle.manifest.files.items() if name.endswith(".data"))
    folder = _folder(bundle)
    if not folder.exists():
        writable_cache()
        folder.parent.mkdir(exist_ok=True)
        _check_room(folder.parent, stored)
        _save(bundle, model, folder)
    total = sum(file.stat().st_size for file in folder.iterdir())
    return PackedWeights(str(folder), total, stored)


def find_packed(bundle: Bundle, graph: str) -> Path | None:
    """The packed model of a graph for this machine and this onnxruntime; None if there is none."""
    if graph != _DECODE or not (cache_folder() / PACKED).is_dir():
        return None
    folder = _folder(bundle)
    if not folder.is_dir():
        return None
    with suppress(OSError):  # a cache that can't be written to can still be read
        os.utime(folder / ABOUT)  # the time of the last use, for `gemma-export cache prune`
    return folder / _MODEL


def _folder(bundle: Bundle) -> Path:
    """The place for one bundle, processor and version of onnxruntime."""
    import onnxruntime as ort

    system = (platform.system(), platform.machine(), processor_name(), *processor_features())
    parts = (bundle.digest(), ort.__version__, *system)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return cache_folder() / PACKED / key


def _check_room(folder: Path, stored: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < _MOST_TIMES * stored:
        raise SessionError(
            f"packing needs up to {format_bytes(_MOST_TIMES * stored)} in {folder}, which has "
            f"{format_bytes(free)}; free some, or set GEMMA_EXPORT_CACHE to another disk"
        )


def _save(bundle: Bundle, model: Path, folder: Path) -> None:
    """Write the folder under another name, then rename it."""
    import onnxruntime as ort

    sweep_leftovers(folder.parent, folder.name)
    stage = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(stage / _MODEL)
    for name, value in {
        "optimized_model_external_initializers_file_name": _DATA,
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
        "save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(f"session.{name}", value)
    try:
        stage.mkdir()
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        _check_answers(bundle, model, stage / _MODEL)
        about = About(bundle.manifest.model.id, bundle.manifest.quantization.recipe, "")
        (stage / ABOUT).write_bytes(msgspec.json.encode(about))
        _publish(stage, folder)
    except SessionError:
        raise
    except OSError as error:
        raise SessionError(f"can't write {folder}: {error.strerror or error}") from error
    except Exception as error:  # onnxruntime's exceptions share no type of their own
        reason = str(error).splitlines()[0]
        raise SessionError(f"onnxruntime {ort.__version__} can't pack {model}: {reason}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_answers(bundle: Bundle, model: Path, packed: Path) -> None:
    """Raise SessionError unless both models give the same logits, bit for bit."""
    import onnxruntime as ort

    if not np.array_equal(_answers(bundle, model, False), _answers(bundle, packed, True)):
        raise SessionError(
            f"onnxruntime {ort.__version__} gives other logits with packed weights, so nothing is "
            "kept; use the bundle as it is"
        )


def _answers(bundle: Bundle, path: Path, is_packed: bool) -> "Logits":
    """Logits after each of a few tokens, fed together and one by one."""
    from gemma_runtime.backends.ort import OrtSession, load_model

    manifest = bundle.manifest
    tokens = [token % manifest.vocab_size for token in range(1, 7 * _CHECKED, 7)]
    tokens = tokens[: manifest.context_length]
    raw = load_model(path, None, is_packed=is_packed)
    with OrtSession(raw, manifest, manifest.graph(_DECODE)) as session:
        together = session.score(tokens)
        session.reset()
        return np.concatenate([together, [session.decode(token) for token in tokens]])


def _publish(stage: Path, folder: Path) -> None:
    try:
        stage.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has packed the same
            raise
