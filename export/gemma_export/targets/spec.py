"""What a target declares about itself: data, read without its libraries and without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a target takes beyond the bytes themselves."""

    runtime: int  # bytes of code and graph, and of Python where it runs in Python
    packed: float = 1.0  # of the matrices' bytes: the copy in the order the kernels read
    packing: float = 0.0  # of the table's bytes, while it is packed
    table_kept: bool = False  # the table stays mapped for lookups, beside the head's packed copy
    exporting: int  # bytes that the exporter's libraries take
    tables_exported: float = 0.0  # copies of the table that an export holds
    caches_exported: int = 0  # copies of the caches
    weight_exported: float = 0.0  # bytes per weight
    float_bytes: int = 4  # of caches, norms and weights that are not quantized
    has_ropes: bool = True  # as tables in the file
    alignment: int = 4096  # of a tensor in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A flag that one target alone understands."""

    name: str  # in Python; the flag has dashes
    help: str
    choices: tuple[str, ...]
    default: str | None = None  # None: the target decides
    unavailable: Mapping[str, str] = field(default_factory=dict)  # value → what it would need

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    name: str  # the value of --target
    label: str  # what runs the bundles, as its makers write it
    made_by: str  # module:class of the Target, which takes the options by name
    extra: str  # of gemma-export, to write bundles
    packages: Mapping[str, str]  # module that writing imports → package that brings it
    formats: str  # what it holds of weights, as a phrase for help and errors
    costs: Costs
    options: tuple[Option, ...] = ()
    is_beta: bool = False  # asked for by name, never by `all`: its format may still change
    splits_table: bool = False  # a table may have some channels in int4 and others in int8
