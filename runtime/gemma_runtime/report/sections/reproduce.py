"""The commands that make the bundles, the figures and the page."""

import shlex
from collections.abc import Iterator

from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.parts import Commands, Section, Table, TableRow

_LEAD = (
    "Names of folders are as they were given. Digests on this page tell whether a bundle is the "
    "same, codes digests whether its quantized weights are. All figures are also in this file, as "
    'JSON in its <script type="application/json"> elements.'
)


def reproduce(collected: Collected) -> Section:
    lines = [*_exports(collected), *_measuring(collected)]
    parts = [Commands(tuple(lines))]
    files = [TableRow(source.name, (source.kind,)) for source in collected.sources]
    table = [Table(("figures from", "command"), tuple(files), wraps=True)] if files else []
    return Section("reproduce", "How to reproduce", _LEAD, (*parts, *table))


def _exports(collected: Collected) -> Iterator[str]:
    for column in collected.columns:
        manifest = column.bundle.manifest
        yield shlex.join(
            [
                *("gemma-export", "--checkpoint", manifest.model.id),
                *("--target", manifest.target.name),
                *("--quant", manifest.quantization.recipe),
                *("--context", str(manifest.context_length)),
                *("--output", _folder(column)),
            ]
        )


def _measuring(collected: Collected) -> Iterator[str]:
    folders = [shlex.quote(_folder(column)) for column in collected.columns]
    for index, folder in enumerate(folders, 1):
        yield f"gemma-runtime verify {folder} --json > verify-{index}.json"
        yield f"gemma-runtime eval {folder} --noise --json > eval-{index}.json"
    yield f"gemma-runtime bench {' '.join(folders)} --json > bench.json"
    yield f"gemma-runtime inspect {' '.join(folders)} --json > inspect.json"
    yield f"gemma-runtime report {' '.join(folders)} --from . -o report.html"


def _folder(column: Column) -> str:
    return str(column.bundle.directory)
