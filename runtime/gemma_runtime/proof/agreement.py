"""Measures how far logits are from a golden. Export, verify and benchmarks all use it.

T positions, k top tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.goldens import TopLogits, log_sum_exp

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
    kl = _bucketed_kl(
        want - np.asarray(expected.log_sum_exp)[:, None], got - log_sum_exp(actual)[:, None]
    )
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


def _bucketed_kl(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    p, q = np.exp(log_p), np.exp(log_q)  # (T, k)
    kl: NDArray[np.float64] = (p * (log_p - log_q)).sum(-1)  # (T,)
    rest_p = np.clip(1 - p.sum(-1), 0, None)
    rest_q = np.clip(1 - q.sum(-1), 1e-12, None)
    safe = np.where(rest_p > 0, rest_p, 1.0)
    kl += np.where(rest_p > 0, rest_p * np.log(safe / rest_q), 0.0)
    return kl
