"""optimum-onnx: exported in float32, with a cache, and run by its own model class."""

from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


class _Engine:
    packages = ("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch")
    gives_log_probabilities = False

    def __init__(self, folder: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = ORTModelForCausalLM.from_pretrained(folder, export=True, use_cache=True)
        self._cache: Any = None
        self._count = 0

    def score(self, tokens: list[int]) -> list[list[float]]:
        self._cache, self._count = None, 0
        rows: list[list[float]] = self._feed(tokens).tolist()
        return rows

    def start(self, tokens: list[int]) -> list[float]:
        return self.score(tokens)[-1]

    def step(self, token: int) -> list[float]:
        row: list[float] = self._feed([token])[-1].tolist()
        return row

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def _feed(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        positions = torch.arange(self._count, self._count + len(tokens))[None]
        self._count += len(tokens)
        out = self._model(
            input_ids=ids,
            attention_mask=torch.ones(1, self._count, dtype=torch.int64),
            position_ids=positions,
            past_key_values=self._cache,
        )
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[0]
        return logits


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    return _Engine(folder)
