"""Builds an ONNX graph and writes its weights to an external data file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gemma_export.progress import Tick
from gemma_runtime.manifest import TensorSpec

MICROSOFT = "com.microsoft"
_OPSETS = {"": 21, MICROSOFT: 1}
_IR_VERSION = 10
_ALIGNMENT = 4096  # of tensors in the data file, which ONNX Runtime maps
_DTYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
Attribute: TypeAlias = int | float | str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Region:
    """A range of bytes in a data file."""

    location: str  # the file's name
    offset: int
    length: int


class DataFile:
    """The file of external tensor data, written while the graph is built."""

    def __init__(self, path: Path, progress: Tick) -> None:
        self.location = path.name
        self._file = path.open("wb")
        self._progress = progress
        self._end = 0

    def allocate(self, length: int) -> Region:
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._end = start + length
        return Region(self.location, start, length)

    def write(self, name: str, offset: int, data: NDArray[np.generic]) -> None:
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(data).data)
        self._progress(name, data.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._file:
            self._file.truncate(self._end)


class GraphBuilder:
    """Collects nodes and initializers. Tensors are referred to by name."""

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._made: dict[str, str] = {}  # names of values that are computed once, by what they are

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Attribute] | None = None,
        domain: str = "",
        outputs: Sequence[str] | int = 1,
    ) -> list[str]:
        """Append a node; returns the names of its outputs."""
        name = f"{op}_{len(self._nodes)}"
        names = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self._nodes.append(_node(op, inputs, names, name, domain, attributes or {}))
        return list(names)

    def one(
        self,
        op: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Attribute] | None = None,
        domain: str = "",
    ) -> str:
        """Append a node with one output; returns its name."""
        return self.node(op, inputs, attributes, domain)[0]

    def once(self, what: str, make: Callable[[], str]) -> str:
        """The name of a value that `make` adds to the graph, unless it did so before."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    def has_made(self, what: str) -> bool:
        return what in self._made

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Store a small tensor in the graph, unless one of this name exists; returns the name."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def has(self, name: str) -> bool:
        return name in self._initializers

    def external(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        region: Region,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Declare a tensor in a data file; returns its name."""
        tensor = TensorProto(
            name=name,
            data_type=_DTYPES[dtype],
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", region.location),
            ("offset", str(region.offset)),
            ("length", str(region.length)),
        ):
            tensor.external_data.add(key=key, value=value)
        for key, value in (metadata or {}).items():
            tensor.metadata_props.add(key=key, value=value)
        self._initializers[name] = tensor
        return name

    def view(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Declare a tensor with the same bytes as `of` in another shape; returns its name."""
        tensor = TensorProto()
        tensor.CopyFrom(self._initializers[of])
        tensor.name, tensor.dims[:] = name, shape
        tensor.ClearField("metadata_props")  # `of` has it already
        self._initializers[name] = tensor
        return name

    def array(self, name: str, value: NDArray[np.generic]) -> str:
        """Write an array to the data file, unless one of this name exists; returns the name."""
        if not self.has(name):
            region = self.data.allocate(value.nbytes)
            self.data.write(name, region.offset, value)
            self.external(name, str(value.dtype), value.shape, region)
        return name

    def model(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> onnx.ModelProto:
        ins, outs = ([_value(spec) for spec in specs] for specs in (inputs, outputs))
        graph = helper.make_graph(
            self._nodes, "gemma", ins, outs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="gemma-export"
        )


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], spec.shape)


def _node(
    op: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    name: str,
    domain: str,
    attributes: Mapping[str, Attribute],
) -> onnx.NodeProto:
    node = helper.make_node(op, inputs, outputs, name=name, domain=domain)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return node
