"""Goldens: prompts with the reference's top logits, in a file small enough to ship.

T positions, of which the last J are judged. k top tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import BundleError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.manifest import Agreement


@dataclass(frozen=True, slots=True)
class TopLogits:
    """The k largest logits at each judged position, largest first."""

    ids: list[list[int]]  # (J, k)
    logits: list[list[float]]  # (J, k)
    log_sum_exp: list[float]  # (J,), over the whole vocabulary


@dataclass(frozen=True, slots=True)
class Golden:
    """One prompt with logits of two references.

    `reference` measures the quantization, `quantized` measures the lowering.
    """

    name: str
    tokens: list[int]  # (T,)
    reference: TopLogits  # from the float32 weights
    quantized: TopLogits  # from the quantized weights, computed in float32
    quality: Agreement | None = None  # of the two, over the whole vocabulary; of older exports None

    @property
    def judged(self) -> int:
        """How many positions, from the end, have logits: J."""
        return len(self.reference.ids)


def top_logits(logits: NDArray[np.float32], k: int = 32) -> TopLogits:
    """Reduce (T, V) logits to the k largest and the log-sum-exp of each position."""
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
    """(T, V) → (T,), row by row to avoid a float64 copy of all logits."""
    return np.array([_log_sum_exp(row.astype(np.float64)) for row in logits])


def save_goldens(path: Path, goldens: Sequence[Golden]) -> None:
    path.write_bytes(msgspec.json.encode(goldens))


def load_goldens(path: Path) -> list[Golden]:
    """Read a file of `save_goldens`. Raises BundleError if it is not one."""
    try:
        return decode_json(path.read_bytes(), list[Golden])
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path} is not a goldens file: {error}; export again") from error


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of every token, (T, V), from the logits."""
    rows: NDArray[np.float64] = logits - log_sum_exp(logits)[:, None]
    return rows


def _log_sum_exp(row: NDArray[np.float64]) -> float:
    top = float(row.max())
    return top + float(np.log(np.exp(row - top).sum()))


def _short(x: float) -> float:
    """Round to nine significant digits, which keep every bit of a float32."""
    return float(f"{x:.9g}")
