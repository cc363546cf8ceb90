"""What becomes of each kind of quantized checkpoint. The documentation's table is made from it."""

from collections.abc import Iterator
from typing import NamedTuple

from gemma_export.checkpoint.gguf_codes import STORED
from gemma_export.checkpoint.packed_folder import READERS
from gemma_runtime.formats.gguf import BLOCKS, GgufType


class Source(NamedTuple):
    name: str
    kept: str  # exactly, by --quant source
    dequantized: str  # turned into floats, which every recipe but none rounds again
    refused: str


def sources() -> Iterator[Source]:
    """One row per kind."""
    kept = [kind for kind, stored in STORED.items() if stored.is_exact]
    floats = [kind for kind in GgufType if BLOCKS[kind][0] == 1]
    others = [kind for kind in GgufType if kind not in (*STORED, *floats)]
    inexact = [f"{kind.name} codes with {s.loss}" for kind, s in STORED.items() if s.loss]
    yield Source("GGUF", _names(kept), "; ".join([*inexact, _names(others)]), "NVFP4, Q8_1, Q8_K")
    yield Source("float weights after quantization-aware training", "on the Q4_0 grid", "", "")
    for reader in READERS.values():
        yield Source(reader.name, reader.kept, reader.dequantized, reader.refused)


def _names(kinds: list[GgufType]) -> str:
    return ", ".join(kind.name for kind in kinds)
