"""Goldens: what the reference said, in a file small enough to ship.

T positions, J of them judged: the last ones. k top tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import BundleError


@dataclass(frozen=True, slots=True)
class TopLogits:
    """The k largest logits at each judged position, largest first."""

    ids: list[list[int]]  # (J, k)
    logits: list[list[float]]  # (J, k)
    log_sum_exp: list[float]  # (J,), over the whole vocabulary


@dataclass(frozen=True, slots=True)
class Golden:
    """One prompt. `reference` judges quantization, `quantized` judges the lowering."""

    name: str
    tokens: list[int]  # (T,)
    reference: TopLogits  # float32 weights
    quantized: TopLogits  # the store's weights, in float32 arithmetic

    @property
    def judged(self) -> int:
        """The positions, from the end, that have logits."""
        return len(self.reference.ids)


def top_logits(logits: NDArray[np.float32], k: int = 32) -> TopLogits:
    """Boil (T, V) logits down to the k largest and the normalizer."""
    k = min(k, logits.shape[-1])
    part = np.argpartition(-logits, k - 1, axis=-1)[:, :k]  # (T, k)
    order = np.argsort(-np.take_along_axis(logits, part, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(part, order, -1)
    top = np.take_along_axis(logits, ids, -1)
    return TopLogits(
        ids.tolist(),
        [[_short(x) for x in row] for row in top.tolist()],
        [_short(x) for x in log_sum_exp(logits).tolist()],
    )


def log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(T, V) → (T,), row by row so that no float64 copy of all logits is made."""
    return np.array([_log_sum_exp(row.astype(np.float64)) for row in logits])


def save_goldens(path: Path, goldens: Sequence[Golden]) -> None:
    path.write_bytes(msgspec.json.encode(goldens))


def load_goldens(path: Path) -> list[Golden]:
    """Raises BundleError if the file is not what `save_goldens` writes."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Golden])
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path} holds no goldens: {error}; export the model again") from error


def _log_sum_exp(row: NDArray[np.float64]) -> float:
    top = float(row.max())
    return top + float(np.log(np.exp(row - top).sum()))


def _short(x: float) -> float:
    """float32 in decimal: nine digits bring every bit back."""
    return float(f"{x:.9g}")
