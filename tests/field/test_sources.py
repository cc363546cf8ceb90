"""The documentation's table of quantized checkpoints."""

from gemma_export.checkpoint.sources import sources
from gemma_runtime.formats.gguf import GgufType


def test_the_table_says_of_every_kind_what_becomes_of_it() -> None:
    rows = list(sources())
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.name and row.kept for row in rows)


def test_every_block_type_of_gguf_is_in_the_table() -> None:
    gguf = next(row for row in sources() if row.name == "GGUF")
    for kind in GgufType:
        if kind not in (GgufType.F32, GgufType.F16, GgufType.BF16):
            assert kind.name in gguf.kept + gguf.dequantized
