"""Tables that are looked up by row from their files."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.backends.embedding_table import EmbeddingTable
from gemma_runtime.errors import BundleError

ROWS, WIDTH, GROUP = 262_144, 35 * 256, 32  # the per-layer embeddings of Gemma 4 E2B


def write_header(path: Path, tensors: dict[str, tuple[str, tuple[int, int], int]]) -> int:
    """A safetensors file whose data are a hole of zeros; returns where the data begin."""
    header, start = {}, 0
    for name, (dtype, shape, width) in tensors.items():
        end = start + shape[0] * shape[1] * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return 8 + len(text)


def anonymous_bytes() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().split("\n") if "RssAnon" in x]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_table_of_gigabytes_stays_in_its_file(tmp_path: Path) -> None:
    """In its real size: 1.3 GB, of which a token reads 5 KB. Nothing of it may be copied whole."""
    tensors = {
        "codes": ("U8", (ROWS, WIDTH // 2), 1),
        "scales": ("F16", (ROWS, WIDTH // GROUP), 2),
    }
    data = write_header(tmp_path / "table.safetensors", tensors)
    codes, scales = np.full(WIDTH // 2, 0x9F, np.uint8), np.full(WIDTH // GROUP, 0.5, np.float16)
    with (tmp_path / "table.safetensors").open("r+b") as file:
        file.seek(data + 77_777 * len(codes))
        file.write(codes.tobytes())
        file.seek(data + ROWS * len(codes) + 77_777 * scales.nbytes)
        file.write(scales.tobytes())
    table = EmbeddingTable(tmp_path / "table.safetensors", WIDTH)
    table.rows([0])
    before = anonymous_bytes()
    for token in range(0, ROWS, 256):
        table.rows([token, 77_777])
    grown = anonymous_bytes() - before
    print(f"anonymous memory grew by {grown / 1e6:.1f} MB over 2048 rows of a 1.3 GB table")
    assert grown < 30e6
    expected = np.tile(np.array([15 - 8, 9 - 8], np.float16) / 2, WIDTH // 2)
    assert np.array_equal(table.rows([77_777])[0], expected)


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    write_header(tmp_path / "t.safetensors", {"values": ("F16", (4, 6), 2)})
    with pytest.raises(BundleError, match="do not have 8 values; export the model again"):
        EmbeddingTable(tmp_path / "t.safetensors", 8)
