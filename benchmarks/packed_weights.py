"""Measures what onnxruntime keeps and reads of a quantized matrix, in bits per weight.

    python benchmarks/packed_weights.py

MatMulNBits repacks weights when it loads them. `kept` is the growth of the heap, `read` is the
memory that a product with one row uses (Linux only). Both are differences of two matrices of
unlike height, each in its own process, so that everything else cancels out.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from gemma_runtime.machine import measure_memory, measure_touched

_WIDTH, _HEIGHTS = 2048, (4096, 12288)
_INT8_ACTIVATIONS, _FLOAT_ACTIVATIONS = 4, 0
_REPEATS = 7
_PR_SET_THP_DISABLE = 41  # small pages, as pages are counted whole


class Bytes(NamedTuple):
    kept: int
    read: int | None


class Kind(NamedTuple):
    bits: int
    group: int
    accuracy: int

    @property
    def stored(self) -> float:
        """Bits per weight in the file: codes and float16 scales."""
        return self.bits + 16 / self.group


def main() -> None:
    print("| codes | activations | group | stored | kept on the heap | read |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in _kinds():
        low, high = (_run(kind, height) for height in _HEIGHTS)
        weights = _WIDTH * (_HEIGHTS[1] - _HEIGHTS[0])
        kept = f"{8 * (high.kept - low.kept) / weights:.2f}"
        known = None not in (low.read, high.read)
        read = f"{8 * ((high.read or 0) - (low.read or 0)) / weights:.2f}" if known else "not told"
        name = "int8" if kind.accuracy == _INT8_ACTIVATIONS else "float32"
        cells = (f"int{kind.bits}", name, kind.group, f"{kind.stored:.2f}", kept, read)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _kinds() -> Iterator[Kind]:
    for bits in (4, 8):
        for accuracy in (_INT8_ACTIVATIONS, _FLOAT_ACTIVATIONS):
            for group in (32, 64, 128, 256):
                yield Kind(bits, group, accuracy)


def _run(kind: Kind, height: int) -> Bytes:
    """Measure one matrix in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        _write(model, kind, height)
        command = [sys.executable, __file__, str(model)]
        done = subprocess.run(command, capture_output=True, check=True)
    return msgspec.json.decode(done.stdout, type=Bytes)


def _write(path: Path, kind: Kind, height: int) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, groups = np.random.default_rng(0), _WIDTH // kind.group
    shape = (height, groups, kind.group * kind.bits // 8)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = rng.random(height * groups, dtype=np.float32)
    held = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=_WIDTH,
        N=height,
        bits=kind.bits,
        block_size=kind.group,
        accuracy_level=kind.accuracy,
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, _WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, height])
    graph = helper.make_graph([node], "product", [x], [y], held)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights")


def _measure(model: str) -> Bytes:
    import onnxruntime as ort

    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    row = {"x": np.ones((1, _WIDTH), np.float32)}
    before = measure_memory().anonymous_bytes
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    after = measure_memory().anonymous_bytes
    if before is None or after is None:
        sys.exit("error: this system doesn't tell the size of the heap; run it on Linux")
    session.run(None, row)
    reads = [measure_touched(lambda: session.run(None, row)) for _ in range(_REPEATS)]
    known = [read for read in reads if read is not None]
    return Bytes(after - before, min(known, default=None))  # the interpreter only adds to it


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.buffer.write(msgspec.json.encode(_measure(sys.argv[1])))
    else:
        main()
