"""Names the golden on which quantized weights are furthest from the float32 ones.

A mean over all goldens hides it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gemma_runtime.bundle import Bundle
from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.goldens import load_goldens

BY_LANGUAGE = "by language: gemma-runtime eval"


@dataclass(frozen=True, slots=True)
class WorstGolden:
    name: str
    positions: int
    mean_kl: float  # nats

    def __str__(self) -> str:
        return f"worst golden: {self.name}, KL {self.mean_kl:.4f}"


def worst_golden(by_golden: Mapping[str, Agreement]) -> WorstGolden | None:
    """The one with the largest mean KL, NaN above all; None if there are fewer than two."""
    found = [WorstGolden(name, one.positions, one.mean_kl) for name, one in by_golden.items()]
    return max(found, key=_loss) if len(found) > 1 else None


def worst_of_weights(bundle: Bundle) -> WorstGolden | None:
    """The same for the weights alone, by the parts of `Manifest.quality` that the goldens hold.

    None for a bundle without them. Raises BundleError if the goldens can't be read.
    """
    if "goldens" not in bundle.manifest.roles:
        return None
    goldens = load_goldens(bundle.path("goldens"))
    return worst_golden({one.name: one.quality for one in goldens if one.quality is not None})


def _loss(golden: WorstGolden) -> float:
    return math.inf if math.isnan(golden.mean_kl) else golden.mean_kl
