"""Named data of a `.pte`, shared by its delegates: weights by name, streamed to files.

A weight has N rows, K inputs and G groups per row.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import signed
from gemma_export.progress import Tick
from gemma_export.quantize.store import StoredWeight
from gemma_runtime.errors import TargetError

_ALIGNMENT = 16  # bytes


class NamedData:
    """Keeps weights in files below `folder` until the program is written."""

    def __init__(self, folder: Path, progress: Tick) -> None:
        self._folder = folder
        self._progress = progress
        self._store = NamedDataStore()
        self._held: set[str] = set()

    def output(self) -> NamedDataStoreOutput:
        return self._store.get_named_data_store_output()

    def add(self, name: str, data: NDArray[np.generic]) -> None:
        self._store.add_named_data(name, np.ascontiguousarray(data).tobytes(), _ALIGNMENT)

    def add_weight(self, weight: StoredWeight) -> None:
        """Add `T` for a float32 weight T, else `T.codes` and `T.scales`.

        In 4 bits codes are unsigned and scales bfloat16; in 8 bits they are signed and float32.
        """
        if weight.name in self._held:
            return
        self._held.add(weight.name)
        names = [weight.name]
        if not weight.format.is_float:
            names = [f"{weight.name}.{part}" for part in ("codes", "scales")]
        with ExitStack() as files:
            spools = [_Spool(self._path(name), files) for name in names]
            for start, stop in row_blocks(weight.shape):
                for spool, tensor in zip(spools, _rows(weight, start, stop), strict=True):
                    self._progress(weight.name, spool.write(tensor))
        for name, spool in zip(names, spools, strict=True):
            self._store.add_named_data(name, spool.described(), _ALIGNMENT)

    def _path(self, name: str) -> Path:
        return self._folder / name


class _Spool:
    """A file being written, and the digest of its bytes."""

    def __init__(self, path: Path, files: ExitStack) -> None:
        self.path = path
        self._file = files.enter_context(path.open("wb"))
        self._hash = hashlib.sha256()

    def write(self, rows: Tensor) -> int:
        data = rows.contiguous().view(torch.uint8).numpy().data
        self._hash.update(data)
        return self._file.write(data)

    def described(self) -> FileBackedData:
        """The file and its digest for ExecuTorch's writer; call after the file is closed."""
        return FileBackedData(str(self.path), sha256=self._hash.digest())


def _rows(weight: StoredWeight, start: int, stop: int) -> list[Tensor]:
    if weight.format.is_float:
        return [weight.rows(start, stop)]
    part = weight.codes(start, stop)
    is_int8 = weight.format.bits == 8
    scales = part.scales.to(torch.float32 if is_int8 else torch.bfloat16)
    if (part.scales <= 0).any() or not torch.equal(scales.half(), part.scales):
        raise TargetError(
            f"executorch can't store the scales of {weight.name} exactly: XNNPACK takes only "
            "positive ones, in 4 bits as bfloat16; choose --quant int4 or another target"
        )
    codes = signed(part.codes, 8, weight.shape[1]) if is_int8 else part.codes
    return [codes, scales]  # exact: see `shared_scale`
