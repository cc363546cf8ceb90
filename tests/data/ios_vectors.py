"""Writes what GemmaKit's tests compare with Python and its libraries; not committed.

    python -m tests.data.ios_vectors OUT

- `stored.zip`, `deflated.zip`, `large.zip` (zip64): the tiny bundle's folder, zipped;
- `packed.json`: data and what zlib makes of it, in base64;
- `table-*.safetensors` and `tables.json`: embedding tables, and rows of them;
- `inputs.json`: inputs of Core ML programs for the GPU and for the Neural Engine.
"""

import base64
import json
import random
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.backends.chunk_inputs import ChunkInputs
from gemma_runtime.backends.embedding_table import EmbeddingTable
from gemma_runtime.bundle import open_bundle
from gemma_runtime.manifest import AttentionKind, Graph, Manifest, Rope, TensorRole, TensorSpec

TINY = Path(__file__).parent / "tiny"
ROWS, WIDTH, GROUPS = 24, 64, 2


def write_zips(out: Path) -> None:
    kinds = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
    for name, method in {**kinds, "large": zipfile.ZIP_DEFLATED}.items():
        with zipfile.ZipFile(out / f"{name}.zip", "w", method) as archive:
            for path in sorted(TINY.iterdir()):
                with archive.open(f"tiny/{path.name}", "w", force_zip64=name == "large") as entry:
                    entry.write(path.read_bytes())


def packed() -> Iterator[dict[str, str]]:
    """Data of every kind of block: stored, with fixed and with own codes."""
    chance = random.Random(1)
    samples = [b"", b"a", b"the user " * 9000, chance.randbytes(100_000)]
    samples += [bytes(chance.choices(b"abcdefgh\n ", k=count)) for count in (5, 300, 80_000)]
    for data in samples:
        for level, strategy in (
            (0, 0),
            (1, 0),
            (9, 0),
            (6, zlib.Z_HUFFMAN_ONLY),
            (6, zlib.Z_FIXED),
        ):
            packer = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
            stream = packer.compress(data) + packer.flush()
            yield {"data": _base64(data), "packed": _base64(stream)}


def tables(out: Path) -> Iterator[dict[str, object]]:
    chance = np.random.default_rng(2)
    codes = chance.integers(0, 256, (ROWS, WIDTH), np.uint8)
    scales = chance.random((ROWS, GROUPS)).astype(np.float16)
    parts: dict[str, dict[str, NDArray[np.generic]]] = {
        "float": {"values": chance.standard_normal((ROWS, WIDTH)).astype(np.float16)},
        "int8": {"codes": codes, "scales": scales[:, :1].astype(np.float32)},
        "int4": {"codes": codes[:, : WIDTH // 2], "scales": scales},
        "zeros": {"codes": codes[:, : WIDTH // 2], "scales": scales, "zeros": codes[:, :1]},
    }
    for name, tensors in parts.items():
        path = out / f"table-{name}.safetensors"
        _write_table(path, tensors)
        tokens = [0, 7, ROWS - 1]
        rows = EmbeddingTable(path, WIDTH).rows(tokens).astype(float).tolist()
        yield {"file": path.name, "width": WIDTH, "tokens": tokens, "rows": rows}


def inputs() -> Iterator[dict[str, object]]:
    """Inputs of chunks at several positions; global layers turn a quarter of their pairs."""
    manifest = open_bundle(TINY).manifest
    manifest = replace(
        manifest,
        ropes={
            AttentionKind.LOCAL: Rope(1e4, 1.0),
            AttentionKind.GLOBAL: Rope(1e6, 8.0, rotated=0.25),
        },
    )
    for position, count in ((0, 4), (3, 2), (70, 4), (75, 1)):
        specs = list(_specs(manifest, 4))
        graph = Graph("", tuple(specs), (), ())
        tokens = list(range(3, 3 + count))
        values = ChunkInputs(manifest, {}, tokens, position).of(graph)
        for spec in specs:
            yield {
                "position": position,
                "tokens": tokens,
                "role": spec.role.value,
                "kind": None if spec.kind is None else spec.kind.value,
                "shape": list(spec.shape),
                "values": values[spec.name].astype(float).ravel().tolist(),
            }


def _specs(manifest: Manifest, length: int) -> Iterator[TensorSpec]:
    yield TensorSpec("tokens", "int32", (length,), TensorRole.TOKENS, None, None)
    yield TensorSpec("last", "int32", (1,), TensorRole.LAST, None, None)
    for kind in AttentionKind:
        cache = next(layer for layer in manifest.layers if layer.kind is kind)
        half = cache.head_dim // 2
        columns = cache.slots + (length if kind is AttentionKind.LOCAL else 32)
        for role, dtype, shape in (
            (TensorRole.COS, "float16", (length, half)),
            (TensorRole.SIN, "float16", (length, half)),
            (TensorRole.MASK, "float16", (length, columns)),
            (TensorRole.SLOTS, "int32", (length,)),
            (TensorRole.WRITE, "float16", (cache.slots, length)),
        ):
            yield TensorSpec(f"{kind}_{role}", dtype, shape, role, kind, None)


def _write_table(path: Path, tensors: dict[str, NDArray[np.generic]]) -> None:
    names = {"float16": "F16", "float32": "F32", "uint8": "U8"}
    header, data = {}, b""
    for name, values in tensors.items():
        end = len(data) + values.nbytes
        header[name] = {
            "dtype": names[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [len(data), end],
        }
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_zips(out)
    for name, content in {
        "packed": list(packed()),
        "tables": list(tables(out)),
        "inputs": list(inputs()),
    }.items():
        (out / f"{name}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
