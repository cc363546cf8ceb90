"""`kept_memory` keeps freed memory in the process and returns it at the end."""

import platform
from pathlib import Path

import pytest
import torch

from gemma_export.memory import kept_memory, release_memory

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc",
        reason="only glibc's allocator has this setting",
    ),
]
_SIZE = 200 << 20


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * 4096


def _use_and_free() -> None:
    torch.ones(_SIZE // 4).add_(1)


def test_freed_memory_stays_until_the_block_ends() -> None:
    release_memory()
    before = _resident()
    _use_and_free()
    assert _resident() - before < _SIZE // 4  # the allocator's default
    with kept_memory():
        _use_and_free()
        assert _resident() - before > _SIZE * 3 // 4
    assert _resident() - before < _SIZE // 4
    _use_and_free()
    assert _resident() - before < _SIZE // 4
