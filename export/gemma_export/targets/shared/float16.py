"""Refuses what float16 can't hold: such a value would become Inf, and logits NaN, on the device."""

import torch
from torch import Tensor

from gemma_export.formats.format import Format
from gemma_export.model.ops import lookup_scale
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets import ExportJob
from gemma_runtime.errors import TargetError

_MOST = 65504.0  # the largest float16


def half(name: str, values: Tensor) -> Tensor:
    """A weight's values as float16. Raises TargetError for values beyond it."""
    rounded = values.half()
    if not bool(torch.isfinite(rounded).all()):
        raise _beyond(f"store {name}: a value", float(values.abs().max()))
    return rounded


def half_lookup(table: StoredWeight, scale: float) -> Tensor:
    """The multiplier of the table's looked-up rows as float16: a number, or (M,) with factors.

    Raises TargetError for values beyond float16.
    """
    return half(f"{table.name}'s multiplier", torch.as_tensor(lookup_scale(table, scale)))


def check_scales(name: str, scales: Tensor, fmt: Format) -> Tensor:
    """The scales of codes that a device multiplies out in float16.

    Raises TargetError if a code can give a value beyond float16.
    """
    steps = (1 << fmt.bits) - 1 if fmt.asymmetric else 1 << (fmt.bits - 1)
    largest = float(scales.float().abs().max()) * steps
    if largest > _MOST:
        raise _beyond(f"multiply out {name}: a value", largest)
    return scales


def check_logits(job: ExportJob) -> None:
    """Raise TargetError for logits beyond float16. With a softcap, Inf becomes the cap itself."""
    largest = job.max_products.get(job.config.head, 0.0)
    if job.config.final_softcap is None and largest > _MOST:
        raise _beyond("return the logits: one", largest)


def _beyond(what: str, largest: float) -> TargetError:
    return TargetError(
        f"float16 can't {what} of {largest:.3g} exceeds {_MOST:.0f}; choose a target that computes "
        "in float32, e.g. --target onnx"
    )
