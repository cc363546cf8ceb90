"""The ggml block type that stores a format's codes exactly."""

from gemma_export.formats.format import Format

BLOCK = 32


def block_type(form: Format) -> str | None:
    """The name of the ggml type that stores the format's codes exactly, or None."""
    if form.is_float:
        return "F32"
    if form.group % BLOCK:  # a longer group is stored as several blocks with the same scale
        return None
    if form.bits == 8:
        return None if form.asymmetric else "Q8_0"
    return "Q4_1" if form.asymmetric else "Q4_0"
