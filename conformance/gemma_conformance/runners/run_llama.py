"""llama.cpp in the xllamacpp wheel, with float32 weights in a GGUF file of gemma-export.

The wheel has no converter of Hugging Face folders. Its server gives log-probabilities.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe

_NEVER = -1e4  # of a token that the server didn't list
_ALWAYS = 1e4  # a bias that no logit outweighs


class _Engine:
    packages = ("xllamacpp", "gemma-export")
    gives_log_probabilities = True

    def __init__(self, path: Path, vocabulary: int, letter: int) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 128, 1, 0
        parameters.verbosity, parameters.cache_ram_mib, parameters.warmup = 0, 0, False
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(parameters)
        self._vocabulary = vocabulary
        # The server tells no probabilities where the sampled token is a part of a character. They
        # are of the logits before the bias, so a biased letter makes it tell them always.
        self._bias = [[letter, _ALWAYS]]
        self._tokens: list[int] = []

    def score(self, tokens: list[int]) -> list[list[float]]:
        """Each length is a prompt of its own, processed in one call."""
        return [self._next(tokens[:length], False) for length in range(1, len(tokens) + 1)]

    def start(self, tokens: list[int]) -> list[float]:
        self._tokens = list(tokens)
        return self._next(self._tokens, True)

    def step(self, token: int) -> list[float]:
        """The server keeps the prompt's cache and processes the new token only."""
        self._tokens.append(token)
        return self._next(self._tokens, True)

    def chat(self, messages: list[dict[str, str]]) -> int:
        request = {"messages": messages, "max_tokens": 1, "temperature": 0, "stream": False}
        answer = _decoded(self._server.handle_chat_completions(request))
        count: int = answer["usage"]["prompt_tokens"]
        return count

    def _next(self, prompt: Sequence[int], keeps_cache: bool) -> list[float]:
        request = {
            "prompt": list(prompt),
            "n_predict": 1,
            "n_probs": self._vocabulary,
            "temperature": 0,
            "ignore_eos": True,
            "logit_bias": self._bias,
            "cache_prompt": keeps_cache,
            "stream": False,
        }
        answer = _decoded(self._server.handle_completions(request))
        row = [_NEVER] * self._vocabulary
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[one["id"]] = one["logprob"]
        return row


def _decoded(answer: Any) -> Any:
    return json.loads(answer) if isinstance(answer, str | bytes) else answer


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    request = ExportRequest(
        targets=("gguf",),
        recipe=find_recipe("none"),
        checkpoint=folder,
        context_length=128,
        prefill_length=64,
        output=Path(scratch) / "bundle",
    )
    (result,) = export_bundles(request, QuietReporter())
    config, tokenizer = (
        json.loads((Path(folder) / name).read_text("utf-8"))
        for name in ("config.json", "tokenizer.json")
    )
    letter = tokenizer["model"]["vocab"]["a"]
    return _Engine(result.bundle.directory / "model.gguf", config["vocab_size"], letter)
