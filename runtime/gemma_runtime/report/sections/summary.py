"""The verdict, and each bundle's few numbers that matter most."""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma_runtime.measure.bench import Benchmark
from gemma_runtime.proof.verify import Verdict
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.wording import nats, number, percent, size

_UNKNOWN = "not verified"


@dataclass(frozen=True, slots=True)
class Card:
    label: str
    style: str
    shape: int
    verdict: str
    facts: tuple[tuple[str, str], ...]


def verdict_line(collected: Collected) -> str:
    found = [(column.label, _verdict(collected, column)) for column in collected.columns]
    verdicts = {verdict for _, verdict in found}
    if verdicts == {Verdict.PASS.value}:
        who = "This bundle computes" if len(found) == 1 else "All bundles compute"
        return f"PASS. {who} what the quantized weights say, on the machines below."
    return "; ".join(f"{label}: {verdict}" for label, verdict in found) + "."


def cards(collected: Collected) -> tuple[Card, ...]:
    return tuple(
        Card(
            column.label,
            column.style,
            column.shape,
            _verdict(collected, column),
            tuple(_facts(collected, column)),
        )
        for column in collected.columns
    )


def _verdict(collected: Collected, column: Column) -> str:
    found = collected.verified().get(column.digest)
    return _UNKNOWN if found is None else found.verification.verdict.value


def _facts(collected: Collected, column: Column) -> Iterator[tuple[str, str]]:
    manifest = column.bundle.manifest
    bits = number(manifest.quantization.bits_per_weight, ".2f")
    yield f"{manifest.quantization.recipe}, bits per weight", bits
    yield "all files", size(sum(file.bytes for file in manifest.files.values()))
    quality = manifest.quality
    yield f"KL to float32, {quality.positions} golden tokens", nats(quality.mean_kl)
    evaluated = collected.evaluated().get(column.digest)
    if evaluated is not None and evaluated.evaluation.texts:
        worst = evaluated.evaluation.texts[0]
        if worst.teacher is not None:
            yield f"worst language: {worst.name}, KL", nats(worst.teacher.kl.value)
            yield f"top-1 of {worst.name}", percent(worst.teacher.top1)
    for benchmark in collected.all_of(Benchmark):
        for one in benchmark.bundles:
            if one.digest == column.digest:
                yield "tokens/s, decoding", number(one.decode_tokens_per_second.median, ".1f")
                yield "peak memory", size(one.peak_rss_bytes.median)
