"""Computes on the device of `--device`, which is chosen here for all algorithms.

Weights and text are read on the host and moved to the device; results are moved back to be written.
What lies between computes where its operands are, so no algorithm asks for a device's name. What
differs between devices is here and in `device`: dtypes, how much at once, and how memory is
measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from gemma_export.device import DEVICES, HOST, check_device, grain
from gemma_export.parallel import workers
from gemma_export.ranks import count_local_ranks, local_rank
from gemma_runtime.errors import DeviceError, MemoryLimit
from gemma_runtime.machine import describe_machine, format_bytes

CPU = torch.device(HOST)
# What `auto` takes, the best first: kinds on which all of calibration was run and measured.
_MEASURED = (HOST,)
_WITHOUT_FLOAT64 = ("mps",)


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` is the best of those that were measured.

    Of torchrun's ranks on this machine, each takes a device of its own for `cuda`. Raises
    DeviceError for a device that this torch doesn't have.
    """
    check_device(name)
    if count_local_ranks() > 1:
        name = _of_rank(name)
    if name == "auto":
        return next(_device(kind, 0) for kind in _MEASURED if _count(kind))
    kind, _, index = name.partition(":")
    if int(index or 0) < _count(kind):
        return _device(kind, int(index or 0))
    found = f"it has {_count(kind)}" if _count(kind) else "it has none"
    raise DeviceError(
        f"--device is {name}, but torch {torch.__version__} finds no such device here: {found}; "
        f"choose from {', '.join(_found())}, or install a torch for it"
    )


def _of_rank(name: str) -> str:
    if name.startswith("cuda:"):
        raise DeviceError(
            f"--device is {name}, one device for {count_local_ranks()} ranks; --device cuda gives "
            "each its own"
        )
    return f"cuda:{local_rank()}" if name == "cuda" else name


def unused_note(chosen: torch.device) -> tuple[str, ...]:
    """A note for a user whose accelerator was not chosen."""
    others = [kind for kind in _found() if kind != HOST]
    if chosen.type != HOST or not others:
        return ()
    return (f"calibrating on the host; --device {others[0]} calibrates on the {others[0]} device",)


def _found() -> list[str]:
    return [kind for kind in DEVICES if kind != "auto" and _count(kind)]


def _count(kind: str) -> int:
    """How many devices of this kind torch finds."""
    count: int = torch.get_device_module(kind).device_count()
    return count


def _device(kind: str, index: int) -> torch.device:
    return CPU if kind == HOST else torch.device(kind, index)


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Let `in_order` start work as the device needs it; being out of memory is a MemoryLimit."""
    if device.type == HOST:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # sums stay float32, as on the host
    try:
        with workers(grain(device.type).workers):
            yield
    except RuntimeError as error:
        # Only some of torch's allocators have a class for it.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        raise MemoryLimit(
            f"{device} is out of memory; nothing was written but finished layers, which the next "
            "run goes on from; free some of it, or choose --device cpu"
        ) from error
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@cache
def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of large matrix products: bfloat16 if it is faster than float32.

    Its rounding error is a fiftieth of int4's. Sums, residuals, norms and softmax stay float32.
    Intel processors without matrix tiles (AMX) take twice as long for bfloat16 as for float32.
    """
    is_fast = False
    if device.type == HOST:
        is_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        is_slow = "Intel" in describe_machine(()).cpu and not torch.cpu._is_amx_tile_supported()
        is_fast = is_supported and not is_slow
    elif device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_fast else torch.float32


def in_float64(x: Tensor) -> Tensor:
    """A float64 copy of x: on its device, or on the host if its device has no float64."""
    return (x.cpu() if x.device.type in _WITHOUT_FLOAT64 else x).double()


class DeviceCeiling:
    """`--max-vram`: compared with the estimate first, then with the peak while work proceeds."""

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        """`limit` in bytes."""
        self._device, self._limit, self._highest = device, limit, 0

    def check_estimate(self, estimate: int) -> None:
        """Raise MemoryLimit if the work needs more bytes than are allowed, or than are free."""
        if self._device.type == HOST:
            return
        needed = f"about {format_bytes(estimate)} of {self._device}"
        if self._limit is not None and estimate > self._limit:
            raise MemoryLimit(
                f"this export needs {needed}, --max-vram allows {format_bytes(self._limit)}; raise "
                "it, choose a smaller size, or --device cpu"
            )
        free = _free_bytes(self._device)
        if estimate > free:
            raise MemoryLimit(
                f"this export needs {needed}, where {format_bytes(free)} are free; free more of "
                "it, choose a smaller size, or --device cpu"
            )

    def check_peak(self) -> None:
        """Raise MemoryLimit if torch has held more bytes of the device than are allowed."""
        peak = self.peak_bytes()
        if self._limit is not None and peak is not None and peak > self._limit:
            raise MemoryLimit(
                f"memory of {self._device} reached {format_bytes(peak)}, --max-vram allows "
                f"{format_bytes(self._limit)}; nothing was written"
            )

    def peak_bytes(self) -> int | None:
        """The most bytes that torch has held of the device; None if that is the host.

        torch keeps no peak for mps: there it is the most that was held at any of these calls.
        """
        if self._device.type == HOST:
            return None
        module = torch.get_device_module(self._device)
        if hasattr(module, "max_memory_reserved"):
            held = module.max_memory_reserved(self._device)
        else:
            held = module.driver_allocated_memory()
        self._highest = max(self._highest, held)
        return self._highest


def _free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device; for mps, what may be used of the shared memory."""
    module = torch.get_device_module(device)
    tells = hasattr(module, "mem_get_info")
    free: int = module.mem_get_info(device)[0] if tells else module.recommended_max_memory()
    return free
