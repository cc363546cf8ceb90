"""Blocks of rows: tensors are read, quantized and written one block at a time."""

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 20  # largest block of rows: 4 MiB of float32


def row_blocks(shape: tuple[int, ...], step: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of `step` rows, or of at most BLOCK_ELEMENTS elements."""
    rows, width = shape[0], shape[1] if len(shape) > 1 else 1
    step = step or max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
