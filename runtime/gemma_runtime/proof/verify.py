"""Verifies an artifact on this machine: replays the goldens and compares the logits.

Reports two errors separately. *Lowering* compares the artifact with the reference that has the same
codes: it must be small, and decides between PASS and FAIL. *Quantization* compares it with the
float32 weights: it depends on the recipe and is only reported. J judged tokens, V vocabulary.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from rich.table import Table
from rich.text import Text

from gemma_runtime.backend_table import BACKENDS, Limits
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.agreement import TIE_MARGIN, compare_logits, pool
from gemma_runtime.proof.goldens import Golden, TopLogits, load_goldens, top_logits
from gemma_runtime.proof.worst import WorstPosition, worst_of, worst_positions
from gemma_runtime.proof.worst_golden import BY_LANGUAGE, worst_golden
from gemma_runtime.session import Logits, Session, open_session


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    AMBIGUOUS = "AMBIGUOUS"  # within the limits, but with too many near ties to be sure


@dataclass(frozen=True, slots=True)
class Verification:
    verdict: Verdict
    failures: tuple[str, ...]  # one line for each limit that was exceeded
    limits: Limits
    lowering: Agreement  # artifact against the reference with the same codes: scored and decoded
    scored: Agreement  # lowering, with each prompt in one call
    decoded: Agreement  # lowering, with half a prompt in one call and the rest token by token
    exact: Agreement | None  # lowering with float activations, if the bundle has such a graph
    engines: Agreement | None  # Core ML against our interpreter, if both can run
    paths: Agreement  # decoded against scored, on the positions of both
    quantization: Agreement  # artifact against the float32 reference
    by_golden: dict[str, Agreement]  # lowering, by the golden's name
    worst: tuple[WorstPosition, ...] = ()  # of the lowering, largest KL first
    quantization_by_golden: dict[str, Agreement] = field(default_factory=dict)


_LIMITS = Limits()
_INT8_CACHES_KL = 1e-3  # mean, with float activations and int8 caches


def verify_bundle(bundle: Bundle, threads: int | None = None) -> Verification:
    """Replay a bundle's goldens on its main graph, and on its exact graph if it has one."""
    goldens = load_goldens(bundle.path("goldens"))
    exact = None
    if "exact" in bundle.manifest.graphs:
        with open_session(bundle, threads, exact=True) as session:
            exact = measure_lowering(session, goldens)
    with open_session(bundle, threads) as session:
        limits = limits_of(bundle.manifest.target.name, bundle.manifest.cache_dtype)
        return verify(session, goldens, limits, exact, _engines(bundle, session, goldens))


def limits_of(target: str, cache_dtype: str = "float32") -> Limits:
    """The limits for a target's lowering error.

    The reference rounds int8 caches as the runtime does. But where a value lies between two steps,
    the last bit of its float decides, and later layers cache what follows from it. With float
    activations, that alone costs the real 270M at int8 a mean KL of 6e-5.
    """
    limits = BACKENDS[target].limits if target in BACKENDS else _LIMITS
    return replace(limits, max_exact_kl=_INT8_CACHES_KL) if cache_dtype == "int8" else limits


def measure_lowering(session: Session, goldens: Sequence[Golden]) -> Agreement:
    """A session's lowering error: scored and decoded logits against the same codes' reference."""
    replays = [_compare(golden, *replay(session, golden)) for golden in goldens]
    return pool([part for r in replays for part in (r.scored, r.decoded)])


def compare_sessions(session: Session, other: Session, goldens: Sequence[Golden]) -> Agreement:
    """Compare one session's logits with another's on the goldens' tokens."""
    parts = []
    for golden in goldens:
        actual, expected = replay(session, golden), replay(other, golden)
        parts += [compare_logits(a, top_logits(e)) for a, e in zip(actual, expected, strict=True)]
    return pool(parts)


def _engines(bundle: Bundle, session: Session, goldens: Sequence[Golden]) -> Agreement | None:
    if bundle.manifest.target.name != "coreml" or sys.platform != "darwin":
        return None
    from gemma_runtime.backends.coreml import open_interpreter

    with open_interpreter(bundle) as other:
        return compare_sessions(session, other, goldens)


def verify(
    session: Session,
    goldens: Sequence[Golden],
    limits: Limits = _LIMITS,
    exact: Agreement | None = None,
    engines: Agreement | None = None,
) -> Verification:
    """Replay every golden, once scored and once with prefill and decode; judge the lowering.

    `exact` is the result of `measure_lowering` with float activations, which has a stricter limit.
    `engines` is the result of `compare_sessions` for two engines that run the same artifact.
    Raises BundleError if there are no goldens.
    """
    if not goldens:
        raise BundleError("the bundle has no goldens, so it can't be verified; export again")
    # A NaN or Inf exceeds a limit below, so numpy's warning is not needed.
    with np.errstate(invalid="ignore", over="ignore"):
        replays = [_compare(golden, *replay(session, golden)) for golden in goldens]
    scored, decoded = pool([r.scored for r in replays]), pool([r.decoded for r in replays])
    lowering, paths = pool([scored, decoded]), pool([r.paths for r in replays])
    failures = (
        *_top1_failures(lowering, limits),
        *_kl_failures("scoring", scored, limits.max_mean_kl),
        *_kl_failures("decoding", decoded, limits.max_mean_kl),
        *_kl_failures("decoding against scoring", paths, limits.max_mean_kl),
        *(_kl_failures("the float kernels", exact, limits.max_exact_kl) if exact else ()),
        *(_kl_failures("Core ML against ours", engines, limits.max_mean_kl) if engines else ()),
    )
    return Verification(
        verdict=_verdict(lowering, failures, limits),
        failures=failures,
        limits=limits,
        lowering=lowering,
        scored=scored,
        decoded=decoded,
        exact=exact,
        engines=engines,
        paths=paths,
        quantization=pool([r.quantization for r in replays]),
        by_golden={
            golden.name: pool([r.scored, r.decoded])
            for golden, r in zip(goldens, replays, strict=True)
        },
        worst=worst_of([position for r in replays for position in r.worst]),
        quantization_by_golden={
            golden.name: r.quantization for golden, r in zip(goldens, replays, strict=True)
        },
    )


def replay(session: Session, golden: Golden) -> tuple[Logits, Logits]:
    """Logits of a golden from the two paths: scored, (J, V), and decoded.

    The decoded ones, by prefill and then token by token, start at judged position J // 2 - 1.
    """
    tokens, start = golden.tokens, len(golden.tokens) - golden.judged
    half = start + max(1, golden.judged // 2)
    session.reset()
    if start:
        session.prefill(tokens[:start])
    mark = session.hold()
    scored = session.score(tokens[start:])
    held = session.rewind(mark)  # start, or 0 where the caches can't go back
    rows = [session.prefill(tokens[held:half])]
    rows += [session.decode(token) for token in tokens[half:]]
    session.reset()
    return scored, np.stack(rows)


def render_verification(name: str, verification: Verification) -> Table:
    """The figures as a table, with the verdict as its title and the reasons below."""
    color = {"PASS": "green", "FAIL": "red", "AMBIGUOUS": "yellow"}[verification.verdict]
    # Text, not str: rich would parse brackets in a folder's name as markup.
    title = Text.assemble(f"{name}: ", (verification.verdict.value, color))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    rows = (
        ("lowering", verification.lowering),
        ("  whole prompts", verification.scored),
        ("  token by token", verification.decoded),
        ("  one vs the other", verification.paths),
        *([("  float kernels", verification.exact)] if verification.exact else []),
        *([("  Core ML vs ours", verification.engines)] if verification.engines else []),
        ("quantization", verification.quantization),
        *_worst_row(verification),
    )
    for label, figures in rows:
        table.add_row(label, *_cells(figures))
    table.caption = Text(_caption(verification))
    table.caption_justify = "left"
    return table


def _worst_row(verification: Verification) -> list[tuple[str, Agreement]]:
    by_golden = verification.quantization_by_golden
    worst = worst_golden(by_golden)
    return [] if worst is None else [(f"  worst: {worst.name}", by_golden[worst.name])]


_HEADINGS = ("", "tokens", "top-1", "near\nties", "max\n|Δ|", "mean\n|Δ|", "mean\nKL", "p99\nKL")


@dataclass(frozen=True, slots=True)
class _Replay:
    """The figures of one golden."""

    scored: Agreement
    decoded: Agreement
    paths: Agreement
    quantization: Agreement
    worst: tuple[WorstPosition, ...]


def _compare(golden: Golden, scored: Logits, decoded: Logits) -> _Replay:
    tail = len(scored) - len(decoded)
    decoded_golden = _from(golden.quantized, tail)
    return _Replay(
        scored=compare_logits(scored, golden.quantized),
        decoded=compare_logits(decoded, decoded_golden),
        paths=compare_logits(decoded, top_logits(scored[tail:])),
        quantization=pool(
            [
                compare_logits(scored, golden.reference),
                compare_logits(decoded, _from(golden.reference, tail)),
            ]
        ),
        worst=worst_of(
            [
                *worst_positions(golden, scored, golden.quantized, decoded=False),
                *worst_positions(golden, decoded, decoded_golden, decoded=True),
            ]
        ),
    )


def _from(top: TopLogits, start: int) -> TopLogits:
    return TopLogits(top.ids[start:], top.logits[start:], top.log_sum_exp[start:])


def _top1_failures(lowering: Agreement, limits: Limits) -> tuple[str, ...]:
    agreed = lowering.top1 + lowering.near_ties / lowering.positions
    if agreed >= limits.min_top1:
        return ()
    return (f"top-1 outside near ties is {agreed:.1%}, below {limits.min_top1:.0%}",)


def _kl_failures(what: str, figures: Agreement, limit: float) -> tuple[str, ...]:
    if figures.mean_kl <= limit:  # False for NaN
        return ()
    return (f"mean KL of {what} is {figures.mean_kl:.2e}, above {limit:.0e}",)


def _verdict(lowering: Agreement, failures: Sequence[str], limits: Limits) -> Verdict:
    if failures:
        return Verdict.FAIL
    if lowering.near_ties > limits.max_near_ties * lowering.positions:
        return Verdict.AMBIGUOUS
    return Verdict.PASS


def _cells(figures: Agreement) -> tuple[str, ...]:
    return (
        str(figures.positions),
        f"{figures.top1:.1%}",
        str(figures.near_ties),
        f"{figures.max_abs:.3g}",
        f"{figures.mean_abs:.3g}",
        f"{figures.mean_kl:.1e}",
        f"{figures.p99_kl:.1e}",
    )


def _caption(verification: Verification) -> str:
    if verification.failures:
        return "\n".join(verification.failures)
    if verification.verdict is Verdict.AMBIGUOUS:
        share = verification.lowering.near_ties / verification.lowering.positions
        return (
            f"{share:.0%} of the positions are near ties that went the other way, more than "
            f"{verification.limits.max_near_ties:.0%}: these goldens can't decide"
        )
    return (
        "lowering: error against the reference with the same codes, decides the verdict; "
        f"quantization: error against the float32 weights, depends on the recipe ({BY_LANGUAGE}); "
        f"near ties: leads below {TIE_MARGIN} logits"
    )
