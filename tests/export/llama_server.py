"""Runs GGUF files in llama.cpp itself, using the xllamacpp wheel."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


class LlamaServer:
    """A model loaded in llama.cpp; skips the test, with a reason, if the wheel is missing."""

    def __init__(self, path: Path, context_length: int = 128) -> None:
        xllamacpp = pytest.importorskip(
            "xllamacpp", reason="NOT CHECKED in llama.cpp: pip install xllamacpp"
        )
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context_length, 1, 0
        parameters.verbosity, parameters.cache_ram_mib, parameters.warmup = 0, 0, False
        self._server = xllamacpp.Server(parameters)

    def greedy(self, prompt: str | Sequence[int], new_tokens: int, top: int) -> list[Any]:
        """For each new token, its `id` and `top_logprobs`, the most probable first."""
        request = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "n_probs": top,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": False,
        }
        answer: Any = self._server.handle_completions(request)
        content = json.loads(answer) if isinstance(answer, str | bytes) else answer
        tokens: list[Any] = content["choices"][0]["logprobs"]["content"]
        return tokens

    def log_probabilities(self, prompt: Sequence[int], count: int) -> NDArray[np.float64]:
        """Of each of the `count` tokens to follow, (count,); NaN for those that are not told."""
        (step,) = self.greedy(prompt, 1, top=count)
        found = np.full(count, np.nan)
        for one in step["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found
