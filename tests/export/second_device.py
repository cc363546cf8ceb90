"""A second device for torch, on the host: it computes as the host does, and mixes with nothing.

torch keeps a place for devices that are not its own (PrivateUse1). This one holds each tensor's
numbers in a tensor of the host, and runs every operation on those. As on an accelerator, an
operation refuses tensors of two devices, and numpy can't see its memory. Importing this module adds
the device `second` to the process, for good.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "second"


class _Memory:
    """Counts the bytes of the device that are in use, as `torch.cuda` does for a GPU."""

    def __init__(self) -> None:
        self.free = 1 << 40
        self.dtypes: set[torch.dtype] = set()  # of all that it has held
        self.peak = 0
        self.moved = 0  # tensors that came from the host, or went there
        self._users: dict[int, int] = {}  # of each storage
        self._held = 0

    def hold(self, tensor: "SecondTensor") -> None:
        self.dtypes.add(tensor.dtype)
        storage = tensor.numbers.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where not in self._users:
            self._users[where] = 0
            self._held += size
            self.peak = max(self.peak, self._held)
        self._users[where] += 1
        weakref.finalize(tensor, self._release, where, size)

    def _release(self, where: int, size: int) -> None:
        self._users[where] -= 1
        if not self._users[where]:
            del self._users[where]
            self._held -= size

    def reset(self) -> None:
        self.peak, self.moved, self.dtypes = self._held, 0, set()


class _Module:
    """What torch asks a device's module, and what the exporter does: `torch.second`."""

    memory = _Memory()

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        del seed  # it draws no numbers

    @classmethod
    def max_memory_reserved(cls, device: torch.device) -> int:
        del device
        return cls.memory.peak

    @classmethod
    def mem_get_info(cls, device: torch.device) -> tuple[int, int]:
        del device
        return cls.memory.free, 1 << 40


MEMORY = _Module.memory


class SecondTensor(Tensor):
    """A tensor of the device, by its numbers on the host."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), settings: Any = None
    ) -> Any:
        del types
        return _run(op, *args, **(settings or {}))


def _wrapped(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):  # a view of what is no inference tensor must be none either
        made = torch.Tensor._make_wrapper_subclass(
            SecondTensor,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=SECOND,
        )
    assert isinstance(made, SecondTensor)
    made.numbers = value
    MEMORY.hold(made)
    return made


def _run(op: Any, *args: Any, **settings: Any) -> Any:
    """Run an operation on the numbers of its operands."""
    if op is torch.ops.aten.copy_.default:
        return _copy(*args)
    known: dict[int, SecondTensor] = {}
    wanted = settings.get("device")
    if wanted is not None:
        settings["device"] = torch.device("cpu")
    read = {name: _numbers(op, one, known) for name, one in settings.items()}
    results = op(*(_numbers(op, one, known) for one in args), **read)
    if wanted is not None and torch.device(wanted).type != NAME:
        MEMORY.moved += 1
        return results
    if isinstance(results, (list, tuple)):
        return [_found(one, known) for one in results]
    return _found(results, known)


def _numbers(op: Any, value: Any, known: dict[int, SecondTensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_numbers(op, one, known) for one in value]
    if isinstance(value, SecondTensor):
        known[id(value.numbers)] = value
        return value.numbers
    if isinstance(value, Tensor) and value.dim():  # torch takes single numbers everywhere
        raise RuntimeError(f"{op} has operands on {NAME} and on {value.device}")
    return value


def _found(result: Any, known: dict[int, SecondTensor]) -> Any:
    """An operand that was changed in place, or a new tensor."""
    return known[id(result)] if id(result) in known else _wrapped(result)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the host and the device."""
    del non_blocking
    written, read = (x.numbers if isinstance(x, SecondTensor) else x for x in (target, source))
    MEMORY.moved += source.device != target.device
    written.copy_(read)
    return target


def _add_device() -> tuple[Any, ...]:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library: Any = torch.library.Library
    own, others = library("aten", "IMPL"), library("_", "IMPL")
    # Of the operations that make tensors, those that would resize an empty one.
    arange = torch.ops.aten.arange
    for op in (arange.default, arange.start, arange.start_step):
        own.impl(op, partial(_run, op), "PrivateUse1")
    others.fallback(_run, "PrivateUse1")
    return own, others


_REGISTERED = _add_device()  # for as long as these objects live
SECOND = torch.device(NAME, 0)
