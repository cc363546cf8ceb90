"""mlx-lm in float32 on the CPU."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer


class _Engine:
    packages = ("mlx-lm", "mlx", "transformers")
    gives_log_probabilities = False

    def __init__(self, folder: Path) -> None:
        mx.set_default_device(mx.cpu)
        self._tokenizer = load_tokenizer(folder)
        self._model, _ = load_model(folder)
        self._model.set_dtype(mx.float32)
        self._cache: Any = None

    def score(self, tokens: list[int]) -> list[list[float]]:
        self._cache = make_prompt_cache(self._model)
        return self._feed(tokens)

    def start(self, tokens: list[int]) -> list[float]:
        return self.score(tokens)[-1]

    def step(self, token: int) -> list[float]:
        return self._feed([token])[-1]

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def _feed(self, tokens: list[int]) -> list[list[float]]:
        logits = self._model(mx.array([tokens]), cache=self._cache)[0]
        rows: list[list[float]] = logits.astype(mx.float32).tolist()
        return rows


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    return _Engine(Path(folder))
