"""Finds the positions of goldens where an artifact is furthest from its reference.

T positions, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gemma_runtime.proof.agreement import position_kl
from gemma_runtime.proof.goldens import Golden, TopLogits
from gemma_runtime.session import Logits

_KEPT = 5


@dataclass(frozen=True, slots=True)
class WorstPosition:
    golden: str
    position: int  # in the golden's tokens, from 0
    token: int  # at that position; the logits are for the one after it
    decoded: bool  # token by token; otherwise the prompt in one call
    kl: float  # nats
    expected: int  # the reference's likeliest next token
    actual: int  # the artifact's


def worst_positions(
    golden: Golden, logits: Logits, expected: TopLogits, decoded: bool
) -> tuple[WorstPosition, ...]:
    """The worst of one replay, whose (T, V) logits belong to the golden's last T tokens."""
    start = len(golden.tokens) - len(logits)
    return worst_of(
        WorstPosition(
            golden=golden.name,
            position=start + index,
            token=golden.tokens[start + index],
            decoded=decoded,
            kl=float(kl),
            expected=expected.ids[index][0],
            actual=int(np.argmax(logits[index])),
        )
        for index, kl in enumerate(position_kl(logits, expected))
    )


def worst_of(positions: Iterable[WorstPosition]) -> tuple[WorstPosition, ...]:
    """The few with the largest KL, in order; NaN is larger than any number."""
    order = sorted(positions, key=lambda one: math.inf if math.isnan(one.kl) else one.kl)
    return tuple(order[: -_KEPT - 1 : -1])
