"""What the bundles are, and what they are made of."""

from collections import Counter
from collections.abc import Callable, Iterable

from gemma_runtime.machine import Machine
from gemma_runtime.measure.bench import Benchmark
from gemma_runtime.report.chart import Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.parts import Key, Legend, Section, Table, TableRow
from gemma_runtime.report.scale import linear
from gemma_runtime.report.wording import ABSENT, count, number, size


def identity(collected: Collected) -> Section:
    rows = [
        TableRow(label, tuple(cell(column) for column in collected.columns))
        for label, cell in _lines(collected)
    ]
    machines = [
        TableRow(label, tuple(cells[label] for cells in map(_machine, _machines(collected))))
        for label in _machine(None)
    ]
    head = ("", *(column.label for column in collected.columns))
    found = len(_machines(collected))
    parts = [Table(head, tuple(rows), wraps=True)]
    if found:
        parts.append(Table(("", *[""] * found), tuple(machines), "Measured on", wraps=True))
    return Section("identity", "What was measured", "", tuple(parts))


def sizes(collected: Collected) -> Section:
    parts = [_components(column) for column in collected.columns]
    names = list(dict.fromkeys(name for found in parts for name in found))
    scale = linear([sum(found.values()) for found in parts])
    rows = [
        Row(
            column.label,
            (tuple(_segment(names, n, found[n]) for n in names if n in found),),
        )
        for column, found in zip(collected.columns, parts, strict=True)
    ]
    legend = Legend(tuple(Key(name, _style(names, name), 1) for name in names))
    chart = draw("Bytes of each bundle's files", [Panel("", Form.STACK, scale, size)], rows)
    table = Table(
        ("", *(column.label for column in collected.columns)),
        (
            *(TableRow(n, tuple(size(f[n]) if n in f else ABSENT for f in parts)) for n in names),
            TableRow("all files", tuple(size(sum(found.values())) for found in parts)),
        ),
    )
    lead = "Proof and phone files are optional for an app: only what runs the model must ship."
    return Section("sizes", "Sizes", lead, (legend, chart, table))


def _lines(collected: Collected) -> list[tuple[str, Callable[[Column], str]]]:
    held = collected.held_codes()

    def read_back(column: Column) -> str:
        digest = column.bundle.manifest.quantization.codes_digest
        if held.get(column.digest) is None:
            return f"{digest[:16]}, not read back"
        same = held[column.digest] == digest
        return f"{digest[:16]}, {'read back from the files' if same else 'NOT those in the files'}"

    return [
        ("model", lambda c: f"{c.bundle.manifest.model.id}, {c.bundle.manifest.model.family}"),
        ("parameters", lambda c: count(c.bundle.manifest.model.parameters)),
        ("revision", lambda c: c.bundle.manifest.model.revision or "none"),
        ("model digest", lambda c: c.bundle.manifest.model.digest[:16]),
        ("recipe", lambda c: c.bundle.manifest.quantization.recipe),
        ("bits per weight", _bits),
        ("formats", _formats),
        ("calibrated on", _calibration),
        ("codes digest", read_back),
        ("target", _target),
        ("context", lambda c: f"{count(c.bundle.manifest.context_length)} tokens"),
        ("bundle digest", lambda c: c.digest[:16]),
        ("written by", lambda c: _versions(c.bundle.manifest.tools.items())),
    ]


def _bits(column: Column) -> str:
    return number(column.bundle.manifest.quantization.bits_per_weight, ".2f")


def _formats(column: Column) -> str:
    found = Counter(column.bundle.manifest.quantization.tensors.values())
    return ", ".join(f"{number} × {name}" for name, number in found.items())


def _calibration(column: Column) -> str:
    text = column.bundle.manifest.quantization.calibration
    return "no text" if text is None else f"{count(text.tokens)} tokens, source {text.source}"


def _target(column: Column) -> str:
    target = column.bundle.manifest.target
    return f"{target.name}: {target.label} {target.min_runtime_version} or newer"


def _versions(items: Iterable[tuple[str, str | None]]) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in items)


def _machines(collected: Collected) -> list[Machine]:
    """Each machine once."""
    found: list[Machine] = []
    subjects = [
        one.subject
        for group in (collected.verified(), collected.evaluated(), collected.structured())
        for one in group.values()
    ]
    benchmarks = [one.machine for one in collected.all_of(Benchmark)]
    for machine in (*(subject.machine for subject in subjects), *benchmarks):
        if machine not in found:
            found.append(machine)
    return found


def _machine(machine: Machine | None) -> dict[str, str]:
    if machine is None:
        return dict.fromkeys(("processor", "memory", "system", "runtime"), "")
    return {
        "processor": f"{machine.cpu}, {machine.physical_cores} cores",
        "memory": size(machine.memory_bytes),
        "system": machine.system,
        "runtime": _versions([("Python", machine.python), *machine.runtimes.items()]),
    }


def _components(column: Column) -> dict[str, int]:
    """Bytes by what the files are for, largest part first."""
    manifest = column.bundle.manifest
    roles = {path: role for role, path in manifest.roles.items()}
    graphs = set(manifest.graph_files())
    found: Counter[str] = Counter()
    for path, file in manifest.files.items():
        role = roles.get(path)
        if role in ("goldens", "teacher"):
            found["proof: goldens, teacher"] += file.bytes
        elif role is not None and role != "embedding":
            found["text: tokenizer, chat"] += file.bytes
        elif role == "embedding":
            found["embedding table"] += file.bytes
        elif path in graphs or any(path.startswith(graph) for graph in graphs):
            found["model: graphs, weights"] += file.bytes
        else:
            found["other"] += file.bytes
    return dict(found.most_common())


def _segment(names: list[str], name: str, value: int) -> Value:
    return Value(value, f"{name}: {size(value)}", _style(names, name))


def _style(names: list[str], name: str) -> str:
    return f"p{names.index(name) % 6}"
