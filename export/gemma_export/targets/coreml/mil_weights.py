"""Weights of a quantized store as constants of a MIL program."""

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from numpy.typing import NDArray

from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.coreml.mil_blobs import (
    Blob,
    code_blob,
    float_blob,
    scale_blob,
    scales_shape,
    zero_blob,
)


class Weights:
    """Placeholder constants of the right shape, and the bytes they stand for.

    `blobs` collects the bytes as functions request weights; a shared weight appears once.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, Blob] = {}

    def constant(self, weight: StoredWeight) -> Any:
        """The weight as a value of the function being built."""
        name = weight.name.replace(".", "_")
        if weight.format.is_float:
            made = mb.const(val=_stand_in(weight.shape, types.fp16), name=name)
            self._give(made, weight.name, float_blob(weight))
            return made
        asymmetric = weight.format.asymmetric
        codes = _CODES[weight.format.bits, asymmetric]
        given = {
            "data": (_stand_in(weight.shape, codes), code_blob(weight)),
            "scale": (_stand_in(scales_shape(weight), types.fp16), scale_blob(weight)),
        }
        if asymmetric:
            given["offset"] = _stand_in(scales_shape(weight), codes), zero_blob(weight)
        values = {key: value for key, (value, _) in given.items()}
        made = mb.constexpr_blockwise_shift_scale(**values, name=name)
        for key, (_, blob) in given.items():
            self._give(made.op.inputs[key], f"{weight.name}.{key}", blob)
        return made

    def _give(self, constant: Any, weight_id: str, blob: Blob) -> None:
        constant.op.weight_id = weight_id
        self.blobs[weight_id] = blob


_CODES = {
    (4, False): types.int4,
    (4, True): types.uint4,
    (8, False): types.int8,
    (8, True): types.uint8,
}


def _stand_in(shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """Zeros of this shape that share one element of memory."""
    return np.broadcast_to(np.zeros((), types.nptype_from_builtin(kind)), shape)
