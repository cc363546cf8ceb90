"""Looks up rows of a quantized table whose codes and scales stay in the mapped file.

Only the pages of the rows that are read become resident. GatherBlockQuantized multiplies in the
type of the scales: float16 is not exact for every format, and float32 scales of a whole table are
hundreds of MB in memory. So this reads the codes of a few rows, and computes in float32.
Shapes: T tokens, G groups per row, M width.
"""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from gemma_export.formats.format import Format
from gemma_export.targets.onnx.graph import GraphBuilder


@dataclass(frozen=True, slots=True)
class MappedTable:
    """Names of a table's parts in the graph, each with one row per token of the vocabulary."""

    format: Format
    width: int
    codes: str  # packed, two to a byte in int4: the even one in the low bits
    scales: str  # (V, G) float16
    zeros: str | None  # packed like the codes; None if symmetric


def look_up_rows(graph: GraphBuilder, table: MappedTable, tokens: str) -> str:
    """scale · (code - zero) of the tokens' rows: (1, T, M) float32."""
    fmt, groups = table.format, table.width // table.format.group
    codes = _unpacked(graph, _gather(graph, table.codes, tokens), fmt.bits)  # (1, T, M)
    grouped = graph.constant(f"groups_of_{fmt.group}", np.array([0, 0, -1, fmt.group]))
    codes = graph.one("Reshape", [codes, grouped])  # (1, T, G, group)
    zero = graph.constant(f"zero_{fmt.bits}", np.array(1 << (fmt.bits - 1), np.float32))
    if table.zeros is not None:
        zero = _unpacked(graph, _gather(graph, table.zeros, tokens), fmt.bits)
        first = graph.constant(f"first_{groups}", np.arange(groups))  # without what fills bytes
        zero = _column(graph, graph.one("Gather", [zero, first], {"axis": 2}))
    scales = _floats(graph, _gather(graph, table.scales, tokens))
    values = graph.one("Sub", [codes, zero])
    values = graph.one("Mul", [values, _column(graph, scales)])
    return graph.one("Reshape", [values, graph.constant("joined", np.array([0, 0, -1]))])


def _unpacked(graph: GraphBuilder, packed: str, bits: int) -> str:
    """The last dimension's codes as floats, one per byte or two."""
    if bits == 8:
        return _floats(graph, packed)
    mask = graph.constant("low_bits", np.array(15, np.uint8))
    shift = graph.constant("high_bits", np.array(4, np.uint8))
    low = graph.one("BitwiseAnd", [packed, mask])
    high = graph.one("BitShift", [packed, shift], {"direction": "RIGHT"})
    pairs = graph.one("Concat", [_column(graph, low), _column(graph, high)], {"axis": -1})
    joined = graph.constant("joined", np.array([0, 0, -1]))
    return _floats(graph, graph.one("Reshape", [pairs, joined]))


def _gather(graph: GraphBuilder, rows: str, tokens: str) -> str:
    return graph.one("Gather", [rows, tokens])


def _floats(graph: GraphBuilder, x: str) -> str:
    return graph.one("Cast", [x], {"to": TensorProto.FLOAT})


def _column(graph: GraphBuilder, x: str) -> str:
    """x with a last dimension of 1."""
    return graph.one("Unsqueeze", [x, graph.constant("last_axis", np.array([-1]))])
