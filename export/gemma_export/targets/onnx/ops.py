"""The operations of decoders and encoders alike, as ONNX Runtime's fused operators.

What differs is attention: see `decoder_ops` and `encoder_ops`.

Shapes: T new tokens, M width, N rows and K inputs of a weight, G groups per row, D head size.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from onnx import TensorProto

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.format import stacks
from gemma_export.model.config import LayerSpec
from gemma_export.model.ops import lookup_scale
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.onnx.graph import MICROSOFT, DataFile, GraphBuilder
from gemma_export.targets.onnx.lookup import MappedTable, look_up_rows
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.manifest import Graph, TensorRole

# MatMulNBits quantizes activations to int8 in the weights' groups, which is 2.8 times as fast. With
# int4 weights the loss is not measurable (KL to float 0.487 instead of 0.490 on a 270M). With int8
# weights it is most of the loss, and it grows with the group size.
ACCURACY_LEVEL = "accuracy_level"
FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 0, 4


class OnnxOps:
    """Builds the graph. Values are names of tensors; each weight is written once."""

    def __init__(
        self,
        graph: GraphBuilder,
        io: Graph,
        context: int,
        epsilon: float,
        aside: Mapping[str, DataFile],
    ) -> None:
        """`aside` holds the data files of tables that are only looked up, by the tables' names."""
        self._graph, self._one = graph, graph.one
        self._io = io
        self._context = context
        self._epsilon = epsilon
        self._aside = aside
        self._parts: dict[str, list[str]] = {}  # of values that `columns` split

    def finish(self, result: str, role: TensorRole) -> None:
        """Add the graph output with this role."""
        self._graph.node("Identity", [result], outputs=[self._name(role)])

    def _name(self, role: TensorRole) -> str:
        return self._io.tensor(role).name

    def embed(self, table: StoredWeight, scale: float) -> str:
        pieces = [self._look_up(piece) for piece in table.pieces()]
        rows = self._one("Concat", pieces, {"axis": -1}) if len(pieces) > 1 else pieces[0]
        factor = torch.as_tensor(lookup_scale(table, scale), dtype=torch.float32).numpy()
        return self._one("Mul", [rows, self._graph.constant(f"factor_of_{table.name}", factor)])

    def norm(self, x: str, gain: StoredWeight) -> str:
        return self._norm(x, self._gain(gain))

    def head_norm(self, x: str, gain: StoredWeight, heads: int) -> str:
        return self._head_norm(x, self._gain(gain), heads)

    def value_norm(self, v: str, layer: LayerSpec) -> str:
        width = layer.head_dim
        ones = self._graph.constant(f"ones_{width}", np.ones(width, np.float32))
        return self._head_norm(v, ones, layer.kv_heads)

    def project(self, x: str, weights: Sequence[StoredWeight]) -> list[str]:
        """Adjacent weights of the same format share one product, which is split afterwards."""
        values: list[str] = []
        for together in stacks(weights, lambda weight: weight.format):
            y = self._matmul(x, together)
            values += self._split(y, [weight.shape[0] for weight in together])
        return values

    def add_norm(
        self, x: str, branch: str, post: StoredWeight | None, then: StoredWeight
    ) -> tuple[str, str]:
        added = branch if post is None else self.norm(branch, post)
        inputs = [x, added, self._gain(then)]
        attributes = {"epsilon": self._epsilon}
        outputs = self._graph.node(
            "SkipSimplifiedLayerNormalization", inputs, attributes, MICROSOFT, outputs=4
        )
        return outputs[3], outputs[0]

    def scaled_add_norm(
        self, x: str, branch: str, post: StoredWeight, factor: StoredWeight, then: StoredWeight
    ) -> tuple[str, str]:
        value = self._graph.array(factor.name, factor.rows(0, 1).numpy())
        y = self._one("Mul", [self.add(x, self.norm(branch, post)), value])
        return y, self.norm(y, then)

    def add(self, a: str, b: str) -> str:
        return self._one("Add", [a, b])

    def scaled(self, x: str, factor: float) -> str:
        value = self._graph.constant(f"factor_{factor:.9g}", np.array(factor, np.float32))
        return self._one("Mul", [x, value])

    def columns(self, x: str, part: int, parts: int) -> str:
        if x not in self._parts:
            self._parts[x] = self._graph.node(
                "Split", [x], {"axis": -1, "num_outputs": parts}, outputs=parts
            )
        return self._parts[x][part]

    def geglu(self, gate: str, up: str) -> str:
        gelu = self._one("FastGelu", [gate], domain=MICROSOFT)
        return self._one("Mul", [gelu, up])

    def _look_up(self, table: StoredWeight) -> str:
        """The rows of a table for the tokens, (1, T, K)."""
        tokens = self._name(TensorRole.TOKENS)
        if table.format.is_float:
            return self._one("Gather", [self._float([table]), tokens])
        if table.name in self._aside:
            return look_up_rows(self._graph, self._mapped(table), tokens)
        codes, scales, zeros = self._codes([table])
        inputs = [self._gather_view(table, codes), tokens, scales, *zeros]
        attributes = {
            "bits": table.format.bits,
            "block_size": table.format.group,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        return self._one("GatherBlockQuantized", inputs, attributes, MICROSOFT)

    def _mapped(self, table: StoredWeight) -> MappedTable:
        width, fmt, name = table.shape[1], table.format, table.name
        self._write_codes(name, [table])
        codes = self._gather_view(table, f"{name}.codes")
        zeros = f"{name}.zeros" if fmt.asymmetric else None
        return MappedTable(fmt, width, codes, f"{name}.scales", zeros)

    def _norm(self, x: str, gain: str) -> str:
        attributes = {"axis": -1, "epsilon": self._epsilon, "stash_type": 1}
        return self._one("SimplifiedLayerNormalization", [x, gain], attributes)

    def _head_norm(self, x: str, gain: str, heads: int) -> str:
        split = self._graph.constant(f"heads_{heads}", np.array([0, 0, heads, -1]))
        joined = self._graph.constant("joined", np.array([0, 0, -1]))
        per_head = self._norm(self._one("Reshape", [x, split]), gain)  # (1, T, heads, D)
        return self._one("Reshape", [per_head, joined])

    def _split(self, y: str, sizes: Sequence[int]) -> list[str]:
        if len(sizes) == 1:
            return [y]
        name = "split_" + "_".join(map(str, sizes))
        sections = self._graph.constant(name, np.array(sizes))
        return self._graph.node("Split", [y, sections], {"axis": -1}, outputs=len(sizes))

    def _matmul(self, x: str, weights: Sequence[StoredWeight]) -> str:
        fmt, rows = weights[0].format, sum(weight.shape[0] for weight in weights)
        if fmt.is_float:
            inputs = [x, self._float(weights)]
            return self._one("FusedMatMul", inputs, {"transB": 1}, MICROSOFT)
        codes, scales, zeros = self._codes(weights)
        attributes = {
            "N": rows,
            "K": weights[0].shape[1],
            "bits": fmt.bits,
            "block_size": fmt.group,
            ACCURACY_LEVEL: _INT8_ACTIVATIONS,
        }
        inputs = [x, codes, scales, *zeros]
        return self._one("MatMulNBits", inputs, attributes, MICROSOFT)

    def _codes(self, weights: Sequence[StoredWeight]) -> tuple[str, str, list[str]]:
        """Names of the codes, scales and zero points of weights stacked along rows."""
        name, fmt = _name(weights), weights[0].format
        codes, scales, zeros = f"{name}.codes", f"{name}.scales.float32", f"{name}.zeros"
        if not self._graph.has(codes):
            self._write_codes(name, weights)
            # onnxruntime folds the cast when it loads the graph.
            half = [f"{name}.scales"]
            self._graph.node("Cast", half, {"to": TensorProto.FLOAT}, outputs=[scales])
        return codes, scales, [zeros] if fmt.asymmetric else []

    def _write_codes(self, name: str, weights: Sequence[StoredWeight]) -> None:
        fmt, rows = weights[0].format, sum(weight.shape[0] for weight in weights)
        groups = weights[0].shape[1] // fmt.group
        block = fmt.group * fmt.bits // 8  # bytes of codes per group
        graph, data = self._graph, self._data_of(weights)
        code_region = data.allocate(rows * groups * block)
        scale_region = data.allocate(rows * groups * 2)
        zero_width = (groups * fmt.bits + 7) // 8
        zero_region = data.allocate(rows * zero_width if fmt.asymmetric else 0)
        for row, weight, start, stop in _blocks(weights):
            part = weight.codes(start, stop)
            data.write(name, code_region.offset + row * groups * block, part.codes.numpy())
            data.write(name, scale_region.offset + row * groups * 2, part.scales.numpy())
            if part.zeros is not None:
                data.write(name, zero_region.offset + row * zero_width, part.zeros.numpy())
        held = [
            ("codes", "uint8", (rows, groups, block), code_region),
            ("scales", "float16", (rows, groups), scale_region),
            ("zeros", "uint8", (rows, zero_width), zero_region),
        ]
        for part_name, dtype, shape, region in held[: 3 if fmt.asymmetric else 2]:
            metadata = {"part": part_name, "rows": _rows(weights)}
            graph.external(f"{name}.{part_name}", dtype, shape, region, metadata)

    def _gather_view(self, table: StoredWeight, codes: str) -> str:
        """The codes in the shape that GatherBlockQuantized expects: (V, bytes per row)."""
        rows, width = table.shape
        return self._graph.view(f"{codes}.rows", codes, (rows, width * table.format.bits // 8))

    def _float(self, weights: Sequence[StoredWeight]) -> str:
        name, width = _name(weights), weights[0].shape[1]
        if not self._graph.has(name):
            data, rows = self._data_of(weights), sum(weight.shape[0] for weight in weights)
            region = data.allocate(rows * width * 4)
            for row, weight, start, stop in _blocks(weights):
                values = weight.rows(start, stop).numpy()
                data.write(name, region.offset + row * width * 4, values)
            self._graph.external(name, "float32", (rows, width), region)
        return name

    def _data_of(self, weights: Sequence[StoredWeight]) -> DataFile:
        return self._aside.get(weights[0].name, self._graph.data)

    def _gain(self, gain: StoredWeight) -> str:
        return self._graph.array(gain.name, 1 + gain.rows(0, gain.shape[0]).numpy())

    def _rope(self, layer: LayerSpec) -> tuple[str, str]:
        """Names of the tables of cos and sin, (context, D / 2); a pair per rope and head size."""
        rope, width = layer.rope, layer.head_dim
        name = f"rope_{rope.base:g}_{rope.factor:g}_{rope.rotated:g}_{width}"
        if not self._graph.has(f"{name}_cos"):
            angle = rope_angles(rope, range(self._context), width)
            self._graph.array(f"{name}_cos", np.cos(angle).astype(np.float32))
            self._graph.array(f"{name}_sin", np.sin(angle).astype(np.float32))
        return f"{name}_cos", f"{name}_sin"


def _name(weights: Sequence[StoredWeight]) -> str:
    """A readable name for a stack of weights. Metadata says which rows belong to which weight."""
    return "+".join(weight.name for weight in weights)


def _rows(weights: Sequence[StoredWeight]) -> str:
    """Start and end of each weight's rows in the stack, as JSON: {name: [start, end]}."""
    ends = list(accumulate(weight.shape[0] for weight in weights))
    spans = zip([0, *ends], ends, strict=False)
    return json.dumps({weight.name: span for weight, span in zip(weights, spans, strict=True)})


def _blocks(weights: Sequence[StoredWeight]) -> Iterator[tuple[int, StoredWeight, int, int]]:
    """Blocks of a stack of weights: first row in the stack, weight, its rows [start, stop)."""
    first = 0
    for weight in weights:
        for start, stop in row_blocks(weight.shape):
            yield first + start, weight, start, stop
        first += weight.shape[0]
