"""Runs one program that a model wrote, in a process that can do little. A script of its own.

Standard input: a line with a nonce, then the program. The nonce comes back on standard output only
if the program ran to its end, so a program that exits early has not passed. Arguments: seconds of
CPU, bytes of memory. The working directory is the only place that the program can write to.
"""

import ctypes
import os
import sys

_NEWNET, _NEWUSER, _NEWPID, _NEWIPC = 0x40000000, 0x10000000, 0x20000000, 0x08000000
_FILE_BYTES = 1 << 20
# Landlock: https://docs.kernel.org/userspace-api/landlock.html
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same numbers on every architecture
_WRITES = sum(1 << bit for bit in (1, *range(4, 13)))  # write, remove and make files
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # from versions 2 and 3 on
_NO_NEW_PRIVILEGES = 38


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("writes", ctypes.c_uint64),
        ("tcp", ctypes.c_uint64),  # from version 4 on
        ("scoped", ctypes.c_uint64),  # from version 6 on
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def main() -> None:
    """Isolate this process, run the program in a child, and end as it ends."""
    nonce, program = sys.stdin.buffer.read().split(b"\n", 1)
    result, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    isolation = [
        name for name, works in (("namespaces", _unshare()), ("landlock", _landlock())) if works
    ]
    os.write(result, " ".join([*isolation, "limits"]).encode() + b"\n")
    child = os.fork()  # the first process of its own namespace, where no other can be signalled
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    _limit(int(sys.argv[1]), int(sys.argv[2]))
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    os.write(result, nonce)
    os._exit(0)


def _limit(seconds: int, memory: int) -> None:
    import resource

    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except ValueError:  # macOS refuses RLIMIT_AS
            continue


def _unshare() -> bool:
    """No network, no other process, no shared memory; as a user of our own where root is needed."""
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    spaces = _NEWNET | _NEWPID | _NEWIPC
    return unshare is not None and any(unshare(flags) == 0 for flags in (spaces | _NEWUSER, spaces))


def _landlock() -> bool:
    """Writing only beneath the working directory; no TCP, no signals to other processes."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 1:
        return False
    writes = _WRITES | (_REFER if version > 1 else 0) | (_TRUNCATE if version > 2 else 0)
    rules = _Ruleset(writes, 3, 3)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    folder = os.open(".", os.O_PATH | os.O_DIRECTORY)
    beneath = _Beneath(writes, folder)
    done = (
        ruleset >= 0
        and libc.syscall(_ADD, ruleset, 1, ctypes.byref(beneath), 0) == 0
        and libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        and libc.syscall(_RESTRICT, ruleset, 0) == 0
    )
    os.close(folder)
    return bool(done)


if __name__ == "__main__":
    main()
