"""Saves a MIL program as an `.mlpackage` and streams its weights.

coremltools translates the program. Its constants are placeholders; `BlobFile` writes the real bytes
instead of coremltools' weight file.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.backend.mil.helper import (
    create_file_value_tensor,
    types_to_proto_primitive,
)
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
from coremltools.converters.mil.mil import Program

from gemma_export.progress import Tick
from gemma_export.targets.coreml.mil_blobs import Blob, BlobFile, array_blob

VERSION = ct.target.iOS18
_AUTHOR = "com.apple.CoreML"


def save_package(program: Program, blobs: Mapping[str, Blob], path: Path, progress: Tick) -> None:
    """Write the program. `blobs` maps a constant's `weight_id` to its bytes."""
    data = path / "Data" / _AUTHOR
    (data / "weights").mkdir(parents=True)
    with BlobFile(data / "weights" / "weight.bin") as file:
        translated = _Translation(program, blobs, file, progress).export()
    model = CoreMLProtoExporter(
        program,
        translated,
        predicted_feature_name=None,
        predicted_probabilities_name=None,
        classifier_config=None,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=VERSION,
    ).export(VERSION)
    (data / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    (path / "Manifest.json").write_text(json.dumps(_manifest(), indent=4))


class _Translation(MILProtoExporter):  # type: ignore[misc]  # coremltools is untyped
    """coremltools' translation to protobuf, with our weight file."""

    def __init__(
        self,
        program: Program,
        blobs: Mapping[str, Blob],
        file: BlobFile,
        progress: Tick,
    ) -> None:
        super().__init__(program, "", VERSION)
        self._blobs = blobs
        self._file = file
        self._progress = progress
        self._places: dict[object, int] = {}

    def create_file_value(self, var: Any) -> Any:
        """Write a constant unless an equal one exists; returns a reference to it."""
        blob = self._blobs.get(var.op.weight_id)
        key = var.op.weight_id if blob else (var.val.dtype.str, var.val.tobytes())
        if key not in self._places:
            self._places[key] = self._file.add(blob or _immediate(var.val))
            if blob:
                self._progress(var.op.weight_id, blob.bytes)
        return create_file_value_tensor(
            file_name="@model_path/weights/weight.bin",
            offset=self._places[key],
            dim=var.val.shape,
            data_type=types_to_proto_primitive(var.sym_type.get_primitive()),
        )


def _immediate(values: Any) -> Blob:
    if values.dtype != np.float16:
        raise TypeError(
            f"a {values.dtype} constant has no blob; only float16 constants may be inline"
        )
    return array_blob(values)


def _manifest() -> dict[str, object]:
    """Fixed ids, so that equal exports give equal bytes."""
    model, weights = (
        str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_AUTHOR}/{name}"))
        for name in ("model.mlmodel", "weights")
    )
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model: {
                "author": _AUTHOR,
                "description": "CoreML Model Specification",
                "name": "model.mlmodel",
                "path": f"{_AUTHOR}/model.mlmodel",
            },
            weights: {
                "author": _AUTHOR,
                "description": "CoreML Model Weights",
                "name": "weights",
                "path": f"{_AUTHOR}/weights",
            },
        },
        "rootModelIdentifier": model,
    }
