"""An XNNPACK graph under construction, as ExecuTorch's delegate reads it.

A value is an id. Shapes are for one token: the token dimension is 1 here, and the delegate resizes
it at run time.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from numpy.typing import NDArray

from gemma_export.targets.executorch.named_data import NamedData

Value: TypeAlias = int

_INVALID, _NO_OFFSET = 2**32 - 1, 2**64 - 1
_INPUT, _OUTPUT = 1, 2  # flags of the delegate's external values
_TRANSPOSE_B = 1
_INFER = 0  # in a shape: the dimension that is inferred at run time


class XnnGraph:
    """One delegate's nodes and values. Constants go to the program's named data."""

    def __init__(self, constants: NamedData) -> None:
        self._constants = constants
        self._nodes: list[xnn.XNode] = []
        self._values: list[xnn.XValue] = []
        self._data = [xnn.ConstantDataOffset(0, 0)]
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._shapes: dict[Value, tuple[int, ...]] = {}
        self._known: dict[str, Value] = {}

    @property
    def is_empty(self) -> bool:
        return not self._nodes

    @property
    def output_shapes(self) -> list[tuple[int, ...]]:
        """Shapes for one token."""
        return [self._shapes[value] for value in self._outputs]

    def shape(self, value: Value) -> tuple[int, ...]:
        return self._shapes[value]

    def input(self, shape: Sequence[int]) -> Value:
        value = self._value(shape)
        self._inputs.append(value)
        return value

    def output(self, value: Value) -> None:
        self._outputs.append(value)

    def constant(self, name: str, data: NDArray[np.float32]) -> Value:
        """A float32 constant; the same name is the same constant."""
        if name not in self._known:
            self._constants.add(name, data)
            self._known[name] = self._value(data.shape, buffer=self._buffer(name, data.nbytes))
        return self._known[name]

    def scalar(self, number: float) -> Value:
        return self.constant(f"scalar {number!r}", np.array([number], np.float32))

    def weight(self, name: str, shape: tuple[int, int]) -> Value:
        """A float32 matrix from the named data."""
        return self._value(shape, buffer=self._buffer(name, math.prod(shape) * 4))

    def blockwise(self, name: str, shape: tuple[int, int], group: int) -> Value:
        """An int4 matrix (N, K) from the named data: codes (N, K / 2), bfloat16 scales (N, G)."""
        rows, width = shape
        groups = width // group
        buffer = self._buffer(f"{name}.codes", rows * width // 2)
        params = xnn.PerChannelGroupQuant(
            scale=[],
            channel_dim=0,
            group_size=group,
            scale_buffer_idx=self._buffer(f"{name}.scales", rows * groups * 2),
            num_scales=rows * groups,
        )
        return self._quantized(shape, xnn.XNNDatatype.xnn_datatype_qbint4, buffer, params)

    def channelwise(self, name: str, shape: tuple[int, int]) -> Value:
        """An int8 matrix (N, K) from the named data: codes (N, K), float32 scales (N, 1)."""
        rows, width = shape
        buffer = self._buffer(f"{name}.codes", rows * width)
        params = xnn.PerChannelQuant(
            scale=[],
            channel_dim=0,
            scale_buffer_idx=self._buffer(f"{name}.scales", rows * 4),
            num_scales=rows,
        )
        return self._quantized(shape, xnn.XNNDatatype.xnn_datatype_qcint8, buffer, params)

    def unary(self, kind: type[xnn.XNNNode1x1], x: Value) -> Value:
        y = self._value(self._shapes[x])
        self._node(kind(input_id=x, output_id=y, flags=0))
        return y

    def binary(self, kind: type[xnn.XNNNode2x1], a: Value, b: Value) -> Value:
        y = self._value(np.broadcast_shapes(self._shapes[a], self._shapes[b]))
        self._node(kind(input1_id=a, input2_id=b, output_id=y, flags=0))
        return y

    def quantize(self, x: Value) -> Value:
        """Dynamic int8: each token's scale and zero point are computed at run time."""
        params = xnn.PerTokenDynamicQuant(num_nonbatch_dims=1)
        kind = xnn.XNNDatatype.xnn_datatype_qdint8
        y = self._quantized(self._shapes[x], kind, 0, params)
        self._node(xnn.XNNConvert(input_id=x, output_id=y, flags=0))
        return y

    def linear(self, x: Value, weight: Value) -> Value:
        """x · wᵀ."""
        y = self._value((*self._shapes[x][:-1], self._shapes[weight][0]))
        self._node(
            xnn.XNNFullyConnected(
                input1_id=x, filter_id=weight, bias_id=_INVALID, output_id=y, flags=0
            )
        )
        return y

    def matmul(self, a: Value, b: Value, transposed: bool = False) -> Value:
        """a · b, or a · bᵀ, batch by batch."""
        columns = self._shapes[b][-2 if transposed else -1]
        y = self._value((*self._shapes[a][:-1], columns))
        flags = _TRANSPOSE_B if transposed else 0
        self._node(xnn.XNNBatchMatrixMultiply(input1_id=a, input2_id=b, output_id=y, flags=flags))
        return y

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Reshape. The token dimension must be -1; no other may be."""
        count = int(np.prod(self._shapes[x]))
        known = int(np.prod([n for n in shape if n != -1]))
        y = self._value([count // known if n == -1 else n for n in shape])
        new_shape = [_INFER if n == -1 else n for n in shape]
        self._node(
            xnn.XNNStaticReshape(
                num_dims=len(shape), new_shape=new_shape, input_id=x, output_id=y, flags=0
            )
        )
        return y

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        shape = self._shapes[x]
        y = self._value([shape[i] for i in order])
        self._node(
            xnn.XNNStaticTranspose(
                num_dims=len(order), perm=list(order), input_id=x, output_id=y, flags=0
            )
        )
        return y

    def slice(self, x: Value, start: int, size: int) -> Value:
        """Elements [start, start + size) of the last dimension."""
        shape = self._shapes[x]
        y = self._value((*shape[:-1], size))
        self._node(
            xnn.XNNStaticSlice(
                num_dims=len(shape),
                offsets=[0] * (len(shape) - 1) + [start],
                sizes=[_INFER] * (len(shape) - 1) + [size],
                input_id=x,
                output_id=y,
                flags=0,
            )
        )
        return y

    def concat(self, a: Value, b: Value) -> Value:
        """Concatenate along the last dimension."""
        *rest, width = self._shapes[a]
        y = self._value((*rest, width + self._shapes[b][-1]))
        self._node(
            xnn.XNNConcatenate2(
                axis=len(rest),
                input1_id=a,
                input2_id=b,
                input3_id=_INVALID,
                input4_id=_INVALID,
                output_id=y,
                flags=0,
                input5_id=_INVALID,
            )
        )
        return y

    def serialize(self) -> bytes:
        """The delegate's flatbuffer. External ids number the inputs first, then the outputs."""
        for place, value in enumerate((*self._inputs, *self._outputs)):
            tensor = self._values[value].xvalue_union
            assert isinstance(tensor, xnn.XNNTensorValue)
            tensor.external_id = place
            tensor.flags = _INPUT if place < len(self._inputs) else _OUTPUT
        blob: bytes = serialize_xnnpack_binary(
            xnn.XNNGraph(
                version="0",
                xnodes=self._nodes,
                xvalues=self._values,
                num_externs=len(self._inputs) + len(self._outputs),
                input_ids=self._inputs,
                output_ids=self._outputs,
                constant_data=self._data,
            ),
            bytearray(),
        )
        return blob

    def _value(self, shape: Sequence[int], buffer: int = 0) -> Value:
        tensor = self._tensor(shape, xnn.XNNDatatype.xnn_datatype_fp32, buffer)
        self._values.append(xnn.XValue(xvalue_union=tensor))
        return int(tensor.id_out)

    def _quantized(
        self, shape: Sequence[int], kind: xnn.XNNDatatype, buffer: int, params: xnn.XNNQuantParams
    ) -> Value:
        tensor = self._tensor(shape, kind, buffer)
        value = xnn.XNNQuantizedTensorValue(tensor_value=tensor, quant_params=params)
        self._values.append(xnn.XValue(xvalue_union=value))
        return int(tensor.id_out)

    def _tensor(
        self, shape: Sequence[int], kind: xnn.XNNDatatype, buffer: int
    ) -> xnn.XNNTensorValue:
        value = len(self._values)
        self._shapes[value] = tuple(int(n) for n in shape)
        return xnn.XNNTensorValue(
            datatype=kind,
            num_dims=len(shape),
            dims=list(self._shapes[value]),
            constant_buffer_idx=buffer,
            external_id=_INVALID,
            flags=0,
            id_out=value,
        )

    def _buffer(self, name: str, size: int) -> int:
        """Refer to `size` bytes of named data; returns the index of the reference."""
        self._data.append(xnn.ConstantDataOffset(offset=_NO_OFFSET, size=size, named_key=name))
        return len(self._data) - 1

    def _node(self, node: xnn.XNodeUnion) -> None:
        self._nodes.append(xnn.XNode(xnode_union=node, debug_handle=len(self._nodes)))
