"""Checks the results of the emulated processors, and compares them with those of this machine.

    python -m tests.arm64.judge FOLDER SKIPPED CPU…

SKIPPED is the number of skipped checks, for the summary. FOLDER contains `x86.json` and, for each
CPU: `CPU.json`, written by `answers`; `CPU.tokens`, written by gemma_native; and
`CPU.onnxruntime.kernels` and `CPU.executorch.kernels`, the counts of emulated instructions.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from tests.arm64.answers import Answer, load_answers

NATIVE = "executorch-int4"
# ONNX Runtime rounds activations to int8 in blocks whose size depends on the processor; on a
# cortex-a53 it does not round them. Measured: at most 4e-4. int4 weights cost this model 1e-1.
MAX_MEAN_KL = 2e-3
TIE_MARGIN = 0.1  # in logits; measured: tokens that swapped ranks were less than 0.05 apart
# In a model this small, XNNPACK's int8 activations are the same on every processor; only float32
# rounding differs. Measured: 2e-6. The 270M's logits differ by 2, probably because some activations
# round to another int8.
MAX_NATIVE_DELTA = 1e-5
# For each processor: the instruction its fastest kernels use, and instructions it doesn't have.
KERNELS: Mapping[str, tuple[str | None, tuple[str, ...]]] = {
    "cortex-a53": (None, ("sdot", "smmla")),
    "cortex-a76": ("sdot", ("smmla",)),
    "max": ("smmla", ()),
}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    passed: bool
    figures: str


def main(arguments: Sequence[str]) -> int:
    folder, skipped, cpus = Path(arguments[0]), int(arguments[1]), arguments[2:]
    expected = load_answers(folder / "x86.json")
    checks = [_verified(f"x86 {name}", answer) for name, answer in expected.items()]
    for cpu in cpus:
        checks += _judge(folder, cpu, expected)
    for check in checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.figures}")
    failed = sum(not check.passed for check in checks)
    skips = f", {skipped} skipped" if skipped else ""
    print(f"arm64: {len(checks) - failed} passed, {failed} failed{skips}")
    return 1 if failed else 0


def _judge(folder: Path, cpu: str, expected: Mapping[str, Answer]) -> Iterator[Check]:
    if not (folder / f"{cpu}.json").exists():
        yield Check(cpu, False, f"no results; last line of its log: {_last_line(folder, cpu)}")
        return
    answers = load_answers(folder / f"{cpu}.json")
    yield _kernels(folder, cpu, "onnxruntime")
    for name, here in expected.items():
        yield _verified(f"{cpu} {name}", answers[name])
        yield _compared(f"{cpu} {name}", answers[name], here, name == NATIVE)
        if here.exact_tokens is not None:
            same = answers[name].exact_tokens == here.exact_tokens
            yield Check(f"{cpu} {name} float kernels", same, _count(here.exact_tokens, same))
    if NATIVE in expected:
        yield _kernels(folder, cpu, "executorch")
        tokens = [int(word) for word in (folder / f"{cpu}.tokens").read_text().split()]
        same = tokens == expected[NATIVE].tokens
        yield Check(f"{cpu} gemma_native", same, _count(tokens, same))


def _verified(name: str, answer: Answer) -> Check:
    result = answer.verification
    exact = f" ({result.exact.mean_kl:.0e} with float kernels)" if result.exact else ""
    figures = f"{result.verdict}, mean KL {result.lowering.mean_kl:.1e}{exact}"
    reasons = "; ".join([_delta(result.lowering), *result.failures])
    return Check(f"{name} verify", answer.exit_code == 0, f"{figures}; {reasons}")


def _compared(name: str, answer: Answer, here: Answer, native: bool) -> Check:
    logits = np.asarray(answer.logits, np.float32)  # (T, V)
    expected = np.asarray(here.logits, np.float32)
    agreement = compare_logits(logits, top_logits(expected), TIE_MARGIN)
    if native:
        max_abs = float(np.abs(logits - expected).max())
        passed = max_abs <= MAX_NATIVE_DELTA and agreement.top1 == 1
        return Check(f"{name} against x86", passed, f"|Δ| at most {max_abs:.1e}")
    agreed = round(agreement.top1 * agreement.positions) + agreement.near_ties
    passed = agreed == agreement.positions and agreement.mean_kl <= MAX_MEAN_KL
    figures = f"mean KL {agreement.mean_kl:.1e}; {_delta(agreement)}; top-1 {agreement.top1:.0%}"
    return Check(f"{name} against x86", passed, f"{figures}, {agreement.near_ties} near ties")


def _delta(agreement: Agreement) -> str:
    return f"|Δ| at most {agreement.max_abs:.1e}, on average {agreement.mean_abs:.1e}"


def _count(tokens: Sequence[int], same: bool) -> str:
    return f"{len(tokens)} greedy tokens, {'the same as' if same else 'different from'} x86"


def _kernels(folder: Path, cpu: str, runtime: str) -> Check:
    """Check that the processor's fastest kernels ran: otherwise the results prove nothing."""
    lines = (folder / f"{cpu}.{runtime}.kernels").read_text().splitlines()
    counts = {name: int(count) for count, name in map(str.split, lines)}
    expected, forbidden = KERNELS[cpu]
    passed = (expected is None or expected in counts) and not counts.keys() & set(forbidden)
    figures = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
    return Check(f"{cpu} {runtime} kernels", passed, figures)


def _last_line(folder: Path, cpu: str) -> str:
    lines = (folder / f"{cpu}.log").read_text().splitlines()
    return lines[-1] if lines else "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
