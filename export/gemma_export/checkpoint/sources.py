"""What can be exported, collected from the readers' tables for the documentation."""

from collections.abc import Iterator

from gemma_export.checkpoint import (
    adapter_folder,
    gguf,
    gguf_tokenizer,
    sentence_folder,
    text_names,
    weight_files,
)
from gemma_export.checkpoint.gguf_codes import STORED
from gemma_export.checkpoint.packed_folder import READERS
from gemma_export.checkpoint.tokenizer_folder import ADDED_TOKENS, TEMPLATES, TOKENIZERS
from gemma_export.model import attention, hf_config
from gemma_runtime.formats.gguf import BLOCKS, OTHER_TYPES, GgufType

Row = tuple[str, str]  # what is found, what becomes of it


def gguf_types() -> Iterator[Row]:
    """Every block type of GGUF, and what `--quant source` makes of it."""
    for kind, stored in STORED.items():
        yield kind.name, f"codes kept as {stored.format}" + (f", {stored.loss}" * bool(stored.loss))
    floats = [kind for kind in GgufType if BLOCKS[kind][0] == 1]
    yield _names(floats), "floats"
    others = [kind for kind in GgufType if kind not in (*STORED, *floats)]
    yield _names(others), "dequantized"
    yield ", ".join(OTHER_TYPES.values()), "refused"


def tokenizers() -> Iterator[Row]:
    """Where a tokenizer comes from, in order."""
    for name, (_, words) in TOKENIZERS.items():
        yield f"`{name}`", words
    yield from gguf_tokenizer.METADATA.items()


def added_tokens() -> Iterator[Row]:
    """Where tokens come from that the tokenizer lacks, in order."""
    yield from ADDED_TOKENS.items()


def templates() -> Iterator[Row]:
    """Where a chat template comes from, in order."""
    for name, words in TEMPLATES.items():
        yield f"`{name}`", words
    yield from gguf.TEMPLATES.items()


def refused() -> Iterator[Row]:
    """What is refused by name, and why."""
    folders = (
        attention, hf_config, weight_files, text_names, adapter_folder, sentence_folder,
    )  # fmt: skip
    for table in (*folders, gguf, gguf_tokenizer):
        yield from table.REFUSED.items()
    yield f"a `quant_method` other than {', '.join(READERS)}", "give the original checkpoint"


def _names(kinds: list[GgufType]) -> str:
    return ", ".join(kind.name for kind in kinds)
