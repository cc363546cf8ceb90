"""Blocks of rows: what is read, quantized and written at a time."""

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32: what one block of rows may hold


def row_blocks(shape: tuple[int, ...], step: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut a tensor's rows into blocks of `step`, or else of at most BLOCK_ELEMENTS elements."""
    rows, width = shape[0], shape[1] if len(shape) > 1 else 1
    step = step or max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
