"""Judges what the emulated processors said, by `gemma-runtime verify` and beside this machine.

    python -m tests.arm64.judge FOLDER SKIPPED CPU…

FOLDER holds `x86.json` and, for each processor, `CPU.json` of `answers`, `CPU.tokens` of
gemma_native and `CPU.onnxruntime.kernels`, `CPU.executorch.kernels`: counts of instructions in the
code that was emulated.
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
# ONNX Runtime rounds activations to int8 in other blocks on other processors, and in none on a
# cortex-a53. Found are 4e-4 at most, where int4 itself costs this model 1e-1.
MAX_MEAN_KL = 2e-3
TIE_MARGIN = 0.1  # logits; tokens that swapped places were closer than 0.05
# XNNPACK's int8 are the same everywhere in a model this small, and float32's own rounding is left:
# found are 2e-6. The 270M's logits differ by 2, as if some int8 fell the other way.
MAX_NATIVE_DELTA = 1e-5
# What a processor's fastest kernels are made of, and what it can't execute.
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
    told = f", {skipped} skipped" if skipped else ""
    print(f"arm64: {len(checks) - failed} passed, {failed} failed{told}")
    return 1 if failed else 0


def _judge(folder: Path, cpu: str, expected: Mapping[str, Answer]) -> Iterator[Check]:
    if not (folder / f"{cpu}.json").exists():
        yield Check(cpu, False, f"gave no answers; its last words: {_last_words(folder, cpu)}")
        return
    answers = load_answers(folder / f"{cpu}.json")
    yield _kernels(folder, cpu, "onnxruntime")
    for name, here in expected.items():
        yield _verified(f"{cpu} {name}", answers[name])
        yield _compared(f"{cpu} {name}", answers[name], here, name == NATIVE)
        if here.exact_tokens is not None:
            same = answers[name].exact_tokens == here.exact_tokens
            yield Check(f"{cpu} {name} float kernels", same, _counted(here.exact_tokens, same))
    if NATIVE in expected:
        yield _kernels(folder, cpu, "executorch")
        said = [int(word) for word in (folder / f"{cpu}.tokens").read_text().split()]
        same = said == expected[NATIVE].tokens
        yield Check(f"{cpu} gemma_native", same, _counted(said, same))


def _verified(name: str, answer: Answer) -> Check:
    found = answer.verification
    exact = f" ({found.exact.mean_kl:.0e} of float kernels)" if found.exact else ""
    figures = f"{found.verdict}, mean KL {found.lowering.mean_kl:.1e}{exact}"
    reasons = "; ".join([_delta(found.lowering), *found.failures])
    return Check(f"{name} verify", answer.exit_code == 0, f"{figures}; {reasons}")


def _compared(name: str, answer: Answer, here: Answer, native: bool) -> Check:
    logits = np.asarray(answer.logits, np.float32)  # (T, V)
    expected = np.asarray(here.logits, np.float32)
    found = compare_logits(logits, top_logits(expected), TIE_MARGIN)
    if native:
        furthest = float(np.abs(logits - expected).max())
        passed = furthest <= MAX_NATIVE_DELTA and found.top1 == 1
        return Check(f"{name} against x86", passed, f"|Δ| at most {furthest:.1e}")
    agreed = round(found.top1 * found.positions) + found.near_ties
    passed = agreed == found.positions and found.mean_kl <= MAX_MEAN_KL
    figures = f"mean KL {found.mean_kl:.1e}; {_delta(found)}; top-1 {found.top1:.0%}"
    return Check(f"{name} against x86", passed, f"{figures}, {found.near_ties} near ties")


def _delta(found: Agreement) -> str:
    return f"|Δ| at most {found.max_abs:.1e}, on average {found.mean_abs:.1e}"


def _counted(tokens: Sequence[int], same: bool) -> str:
    return f"{len(tokens)} greedy tokens, {'' if same else 'not '}those of x86"


def _kernels(folder: Path, cpu: str, runtime: str) -> Check:
    """Whether its instructions were executed: a kernel that no longer runs would prove nothing."""
    lines = (folder / f"{cpu}.{runtime}.kernels").read_text().splitlines()
    counts = {name: int(count) for count, name in map(str.split, lines)}
    wanted, forbidden = KERNELS[cpu]
    passed = (wanted is None or wanted in counts) and not counts.keys() & set(forbidden)
    told = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
    return Check(f"{cpu} {runtime} kernels", passed, told)


def _last_words(folder: Path, cpu: str) -> str:
    lines = (folder / f"{cpu}.log").read_text().splitlines()
    return lines[-1] if lines else "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
