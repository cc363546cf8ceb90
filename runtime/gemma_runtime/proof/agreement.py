"""Measures how far logits are from a golden. Export, verify and benchmarks all use it.

T positions, k top tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.goldens import TopLogits, log_sum_exp

Floats = NDArray[np.float64]
# In logits. Two tokens closer than this are a near tie: they may swap without a fault. It is three
# times the average change of a 270M logit by onnxruntime's int8 activations (0.16).
TIE_MARGIN = 0.5


def compare_logits(
    actual: NDArray[np.float32], expected: TopLogits, tie_margin: float = TIE_MARGIN
) -> Agreement:
    """Compare (T, V) logits with T positions of a golden.

    KL(expected ‖ actual), in nats, is over the k stored tokens and one bucket for all others. It is
    a lower bound of the true KL, and a tight one, because the bucket's probability is small.
    """
    ids = np.asarray(expected.ids)  # (T, k)
    want = np.asarray(expected.logits, np.float64)  # (T, k)
    got = np.take_along_axis(actual, ids, -1).astype(np.float64)  # (T, k)
    kl = position_kl(actual, expected)
    chosen = actual.argmax(-1)  # (T,)
    same = chosen == ids[:, 0]
    lead = want[:, 0] - np.where(ids == chosen[:, None], want, -np.inf).max(-1)
    delta = np.abs(got - want)
    return Agreement(
        positions=len(ids),
        top1=float(same.mean()),
        near_ties=int((~same & (lead <= tie_margin)).sum()),
        max_abs=float(delta.max()),
        mean_abs=float(delta.mean()),
        mean_kl=float(kl.mean()),
        p99_kl=float(np.quantile(kl, 0.99)),
    )


def position_kl(actual: NDArray[np.float32], expected: TopLogits) -> Floats:
    """`compare_logits`'s KL at each position, (T,)."""
    ids = np.asarray(expected.ids)  # (T, k)
    got = np.take_along_axis(actual, ids, -1).astype(np.float64)  # (T, k)
    log_p = np.asarray(expected.logits, np.float64) - np.asarray(expected.log_sum_exp)[:, None]
    log_q = got - log_sum_exp(actual)[:, None]
    return bucketed_kl(log_p, log_q, np.maximum(left_over(np.exp(log_q)), 1e-12))


def pool(agreements: Sequence[Agreement]) -> Agreement:
    """Combine the agreements of several prompts: means over positions, the largest p99 and max."""
    positions = sum(a.positions for a in agreements)

    def mean(values: Sequence[float]) -> float:
        return sum(a.positions * v for a, v in zip(agreements, values, strict=True)) / positions

    return Agreement(
        positions=positions,
        top1=mean([a.top1 for a in agreements]),
        near_ties=sum(a.near_ties for a in agreements),
        max_abs=max(a.max_abs for a in agreements),
        mean_abs=mean([a.mean_abs for a in agreements]),
        mean_kl=mean([a.mean_kl for a in agreements]),
        p99_kl=max(a.p99_kl for a in agreements),
    )


def bucketed_kl(log_p: Floats, log_q: Floats, rest_q: Floats) -> Floats:
    """KL(p ‖ q), (T,), in nats, over k tokens, (T, k), and one bucket for all others.

    q's probability of the bucket is given, (T,). No bucket counts where p leaves nothing for it.
    """
    p = np.exp(log_p)
    kl: Floats = (p * (log_p - log_q)).sum(-1)
    rest_p = left_over(p)
    filled = (rest_p > 0) & (rest_q > 0)
    kl[filled] += rest_p[filled] * np.log(rest_p[filled] / rest_q[filled])
    return kl


def left_over(p: Floats) -> Floats:
    """What probabilities (T, k) leave for all other tokens: (T,)."""
    rest: Floats = np.clip(1 - p.sum(-1), 0, None)
    return rest
