"""The ggml block type that stores a format's codes exactly."""

from gemma_export.formats.format import Format

BLOCK = 32


def block_type(fmt: Format) -> str | None:
    """The name of the ggml type that stores the format's codes exactly, or None."""
    if fmt.is_float:
        return "F32"
    if fmt.group % BLOCK:  # a longer group is stored as several blocks with the same scale
        return None
    if fmt.bits == 8:
        return None if fmt.asymmetric else "Q8_0"
    return "Q4_1" if fmt.asymmetric else "Q4_0"
