"""The declaration of a target: plain data, importable without torch or the target's libraries."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Constants for estimating the memory of a target's runtime and export."""

    runtime: int  # bytes of code and graph, and of Python if the session runs in Python
    packed: float = 1.0  # share of the matrices' bytes: the copy in the kernels' layout
    packing: float = 0.0  # share of the table's bytes: temporary while it is packed
    table_kept: bool = False  # lookups read the mapped table, besides the head's packed copy
    exporting: int  # bytes that the exporter's libraries take
    caches_exported: int = 0  # copies of the caches
    weight_exported: float = 0.0  # bytes per weight that an export holds
    float_bytes: int = 4  # size of a number in norms and unquantized weights
    half_table: bool = False  # the file contains quantized tables of embeddings as float16
    maps_per_layer: bool = True  # the table of per-layer embeddings stays in its file
    has_ropes: bool = True  # the file contains rope tables
    alignment: int = 4096  # of tensors in the file, in bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A flag of a single target."""

    name: str  # with underscores; the flag has dashes
    help: str
    choices: tuple[str, ...]
    default: str | None = None  # None: the target chooses
    unavailable: Mapping[str, str] = field(default_factory=dict)  # value → software it needs

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    name: str  # the value of --target
    label: str  # official name of the runtime
    made_by: str  # module:class of the Target, which takes the options by name
    extra: str  # extra of gemma-export that installs what exporting needs
    packages: Mapping[str, str]  # module imported by the export → package that contains it
    formats: str  # supported weight formats, as a phrase for help and errors
    costs: Costs
    caches: tuple[str, ...]  # types of the KV caches, the default first
    only_caches: str = ""  # why there are no others
    options: tuple[Option, ...] = ()
    is_beta: bool = False  # its format may still change
    on_device: bool = True  # its runtime runs on phones, laptops or boards
    next_step: str = "gemma-runtime verify {bundle}"  # printed after an export
    rounds_inputs: bool = False  # its runtime rounds the inputs of products to int8
    scales_table: bool = False  # supports a table with column factors
    divides_table: bool = False  # and one whose columns have two formats
    takes_irregular: bool = False  # computes every part named in `GemmaConfig.irregular`
    takes_encoders: bool = False  # writes models that give vectors
    int8_groups: bool = True  # supports int8 in groups; if not, with one scale per channel
    fast_zero_points: bool = True  # if it takes int4 with zero points, its kernels are as fast

    @property
    def is_in_all(self) -> bool:
        """Whether `--target all` includes it: every runtime of a device whose format is final."""
        return self.on_device and not self.is_beta
