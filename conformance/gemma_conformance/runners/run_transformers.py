"""transformers in float32. Option `attention`: eager or sdpa."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class _Engine:
    packages = ("transformers", "torch")
    gives_log_probabilities = False

    def __init__(self, folder: str, attention: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        self._model.train(False)
        self._cache: Any = None

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> list[list[float]]:
        rows: list[list[float]] = self._model(torch.tensor([tokens])).logits[0].tolist()
        return rows

    def start(self, tokens: list[int]) -> list[float]:
        self._cache = None
        return self._feed(tokens)

    def step(self, token: int) -> list[float]:
        return self._feed([token])

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    @torch.inference_mode()
    def _feed(self, tokens: list[int]) -> list[float]:
        out = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        row: list[float] = out.logits[0, -1].tolist()
        return row


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    return _Engine(folder, options["attention"])
