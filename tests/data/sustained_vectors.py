"""Writes the spans of sustained decoding that the Kotlin and Swift ports must reproduce.

    python -m tests.data.sustained_vectors

`pace` lists seconds since the start and, from then on, the seconds of a new token. A prompt takes
half a second; rounds have 10 new tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_runtime.measure.bench_worker import Workload
from gemma_runtime.measure.sustained import sustain
from gemma_runtime.session import FakeSession, Logits

VECTORS = Path(__file__).parent / "sustained_vectors.json"
WORKLOAD = Workload(threads=1, prompt_lengths=(4,), decode_prompt=6, new_tokens=10)
CASES: Sequence[tuple[float, list[list[float]]]] = (
    (31.0, [[0, 0.125]]),
    (60.0, [[0, 0.125], [20, 0.25], [40, 0.1875]]),
    (12.0, [[0, 0.125]]),  # the last span is too short
    (3.0, [[0, 0.125]]),  # the only span is short
    (14.0, [[0, 7.0]]),  # a token takes longer than a span
)


class _Paced(FakeSession):
    def __init__(self, pace: list[list[float]]) -> None:
        super().__init__(lambda tokens: np.eye(16, dtype=np.float32)[3], context_length=16)
        self._pace = pace
        self.now = 0.0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        if len(tokens) > 1:
            self.now += 0.5
        else:
            self.now += [seconds for start, seconds in self._pace if start <= self.now][-1]
        return super().prefill(tokens)


def vectors() -> list[dict[str, object]]:
    return [_vector(seconds, pace) for seconds, pace in CASES]


def _vector(seconds: float, pace: list[list[float]]) -> dict[str, object]:
    session = _Paced(pace)
    total, spans = sustain(
        session, 16, WORKLOAD, seconds, clock=lambda: session.now, celsius=lambda: None
    )
    rates = [[span.seconds, span.tokens_per_second] for span in spans]
    return {"seconds": seconds, "pace": pace, "new_tokens": total, "spans": rates}


if __name__ == "__main__":
    VECTORS.write_text("[\n" + ",\n".join(map(json.dumps, vectors())) + "\n]\n", "utf-8")
