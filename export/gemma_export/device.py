"""The devices of `--device`: their names, and how much each computes at once. Imports no torch."""

import os
import re
from dataclasses import dataclass

from gemma_runtime.errors import DeviceError, nearest_first

HOST = "cpu"
DEVICES = ("auto", HOST, "cuda", "mps")


@dataclass(frozen=True, slots=True)
class Grain:
    """How much is computed at once. Larger pieces take more memory, and start fewer kernels."""

    workers: int  # threads that start work; an accelerator runs what they start one after another
    batch: int  # most elements of a batch's widest activation
    weights: int  # weights of a matrix that gptq rounds at a time
    table_rows: int  # of a table's block; fewer take as long, because gptq goes column by column

    @property
    def held(self) -> int:
        """Most pieces in memory at a time: one for each worker, and one that waits to be read."""
        return self.workers + 1


def grain(kind: str) -> Grain:
    """The grain of a kind of device, such as `cuda`."""
    if kind == HOST:
        return Grain(os.cpu_count() or 1, 1 << 20, 1 << 22, 2048)
    return Grain(1, 1 << 25, 1 << 25, 1 << 14)


def check_device(name: str) -> None:
    """Raise DeviceError unless `name` is one of DEVICES, or cuda:N. It need not be there."""
    if name not in DEVICES and re.fullmatch(r"cuda:\d{1,3}", name) is None:
        raise DeviceError(
            f"--device is {name!r}; expected {nearest_first(name, DEVICES)}, or cuda:N for one of "
            "several"
        )


def kind_of(name: str) -> str:
    """The kind of a checked device's name: `auto` is the host, see `computing.choose_device`."""
    return HOST if name == "auto" else name.partition(":")[0]
