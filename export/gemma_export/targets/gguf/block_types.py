"""Which of ggml's block formats holds a format's codes as they are."""

from gemma_export.formats.format import Format

BLOCK = 32


def block_type(form: Format) -> str | None:
    """The block format by ggml's name; None where none holds the codes."""
    if form.is_float:
        return "F32"
    if form.group % BLOCK:  # a longer group is the same scale several times
        return None
    if form.bits == 8:
        return None if form.asymmetric else "Q8_0"
    return "Q4_1" if form.asymmetric else "Q4_0"
