"""A bundle as a model of lm_eval. Needs the extra `eval`, and no torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from gemma_runtime.bundle import open_bundle
from gemma_runtime.errors import EvaluationError
from gemma_runtime.lm_eval.answers import Answer, AnswerFile
from gemma_runtime.lm_eval.prompts import PromptEncoder
from gemma_runtime.lm_eval.shared import (
    CHUNK,
    Continuation,
    Prompt,
    check_chunk,
    continue_prompts,
    score_continuations,
)
from gemma_runtime.session import open_session
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import load_tokenizer

_T = TypeVar("_T")

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_Pair = tuple[Any, list[int], list[int]]  # texts or None, context, continuation


class GemmaBundle(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """One sequence at a time, so `batch_size` has to be 1. `chunk`: tokens fed at once.

    Values may be texts, as they come from `--model_args`.
    """

    def __init__(
        self,
        bundle: str | Path,
        threads: int | str | None = None,
        exact: bool | str = False,
        chunk: int | str = CHUNK,
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        answers: str | Path | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        _check_placement(batch_size, max_batch_size, device)
        self._bundle = open_bundle(Path(bundle))
        manifest = self._bundle.manifest
        self._exact = str(exact).lower() in ("true", "1")
        self._chunk = check_chunk(int(chunk))
        if self._chunk > manifest.prefill_length:
            raise EvaluationError(
                f"chunks of {chunk} tokens, but the bundle takes at most "
                f"{manifest.prefill_length} at once; give a smaller chunk"
            )
        self.max_length = min(int(max_length or manifest.context_length), manifest.context_length)
        self.max_gen_toks = int(max_gen_toks)
        self.tokenizer = None  # else lm_eval would render its chat template
        self._tokenizer = load_tokenizer(self._bundle)
        self._encoder = PromptEncoder(self._bundle, self._tokenizer)
        self._session = open_session(self._bundle, int(threads) if threads else None, self._exact)
        self._truncated = 0
        self._answers = None if answers is None else AnswerFile(Path(answers), self._identity())

    def close(self) -> None:
        """Close the session and the file of answers."""
        self._session.close()
        if self._answers is not None:
            self._answers.close()

    @property
    def eot_token_id(self) -> int:
        manifest = self._bundle.manifest
        return manifest.stop_tokens[0] if manifest.eos_token is None else manifest.eos_token

    @property
    def prefix_token_id(self) -> int:
        return self._bundle.manifest.bos_token

    @property
    def tokenizer_name(self) -> str:
        return self._bundle.manifest.files[self._bundle.manifest.roles["tokenizer"]].sha256

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._encoder.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._encoder.render(chat_history, reply=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        return self._encoder.encode(string, bos=add_special_tokens is not False)

    def get_model_info(self) -> dict[str, object]:
        """What the results depend on; it goes into the results' `config`."""
        manifest = self._bundle.manifest
        return {
            "bundle": bundle_name(self._bundle.directory),
            "bundle_digest": self._bundle.digest(),
            "model_id": manifest.model.id,
            "model_digest": manifest.model.digest,
            "model_num_parameters": manifest.model.parameters,
            "codes_digest": manifest.quantization.codes_digest,
            "recipe": manifest.quantization.recipe,
            "bits_per_weight": manifest.quantization.bits_per_weight,
            "target": manifest.target.name,
            "exact": self._exact,
            "chunk": self._chunk,
            "max_length": self.max_length,
            "truncated_prompts": self._truncated,
            "runtime_versions": self._versions(),
        }

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._encoder.encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        contexts: dict[tuple[int, ...], tuple[int, ...]] = {}  # keeps one copy of each
        asked = [self._continuation(*pair[1:], contexts) for pair in requests]
        found: list[Any] = [None] * len(asked)
        keys, missing = self._missing([("likelihood", a.context, a.tokens) for a in asked], found)
        answers = score_continuations(self._session, [asked[i] for i in missing], self._chunk)
        for at, likelihood in _progress(answers, len(missing), "likelihoods", disable_tqdm):
            index = missing[at]
            found[index] = (likelihood.log_p, likelihood.is_greedy)
            self._keep(keys[index], found[index])
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def _continuation(
        self,
        context: list[int],
        continuation: list[int],
        contexts: dict[tuple[int, ...], tuple[int, ...]],
    ) -> Continuation:
        """Cut from the left, as lm_eval's `hf` does: the last token is never fed."""
        if not 0 < len(continuation) <= self.max_length:
            raise EvaluationError(
                f"a choice has {len(continuation)} tokens; expected 1 to {self.max_length}, the "
                "context of the bundle"
            )
        room = self.max_length + 1 - len(continuation)
        self._truncated += len(context) > room
        kept = tuple(context[-room:])
        return Continuation(contexts.setdefault(kept, kept), tuple(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, each after one bos; `hf` puts two there."""
        windows: list[_Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                token_list=self._encoder.encode(request.args[0], bos=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(utils.make_disjoint_window, parts):
                windows.append((None, context, tokens))
                owners.append(owner)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, scored, strict=True):
            totals[owner] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        repeats: Counter[int] = Counter()
        asked = []
        for request in requests:
            context, options = request.args
            asked.append(self._prompt(context, options, repeats[id(request)]))
            repeats[id(request)] += 1
        found: list[Any] = [None] * len(asked)
        keys, missing = self._missing([_generation_key(prompt) for prompt in asked], found)
        stops = self._bundle.manifest.stop_tokens
        answers = continue_prompts(
            self._session, self._tokenizer, [asked[i] for i in missing], stops, self._chunk
        )
        for at, text in _progress(answers, len(missing), "texts", disable_tqdm):
            index = missing[at]
            found[index] = text
            self._keep(keys[index], text)
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def _prompt(self, context: str, given: dict[str, Any], nth: int) -> Prompt:
        """`nth` counts repeats of the same request, which draw differently."""
        options: dict[str, Any] = {**normalize_gen_kwargs(given, self.max_gen_toks)}
        until = options.pop("until")
        new_tokens = options.pop("max_gen_toks")
        is_sampled = options.pop("do_sample")
        seed = int(options.pop("seed", 0)) + nth
        values = {name: options.pop(name) for name in _SAMPLING if name in options}
        if options.pop("num_beams", 1) != 1 or options:
            raise EvaluationError(
                f"can't generate with {', '.join(options) or 'num_beams'}; known: until, "
                f"max_gen_toks, do_sample, seed, {', '.join(_SAMPLING)}"
            )
        if not is_sampled:
            penalty = values.get("repetition_penalty", 1.0)
            values = {"temperature": 0.0, "repetition_penalty": penalty}
        room = self.max_length - new_tokens
        if room < 1:
            raise EvaluationError(
                f"{new_tokens} new tokens leave no room for a prompt in the context of "
                f"{self.max_length}; export with a larger --context, or give max_gen_toks"
            )
        tokens = self._encoder.encode(context)
        self._truncated += len(tokens) > room
        stops = tuple(stop for stop in until if stop)
        return Prompt(tuple(tokens[-room:]), new_tokens, stops, Sampling(**values, seed=seed))

    def _missing(
        self, asked: Sequence[tuple[object, ...]], found: list[Any]
    ) -> tuple[list[str], list[int]]:
        """Keys of all questions, and indices of those without an answer; fills the others in."""
        if self._answers is None:
            return [""] * len(asked), [*range(len(asked))]
        keys = [self._answers.key(*question) for question in asked]
        for index, key in enumerate(keys):
            found[index] = self._answers.find(key)
        return keys, [index for index, answer in enumerate(found) if answer is None]

    def _keep(self, key: str, answer: Answer) -> None:
        if self._answers is not None:
            self._answers.add(key, answer)

    def _identity(self) -> str:
        return f"{self._bundle.digest()} {self._exact} {self._chunk} {self._versions()}"

    def _versions(self) -> dict[str, str]:
        packages = ("gemma-export", "tokenizers", *self._bundle.manifest.target.packages)
        return {package: _version(package) for package in packages}


def bundle_name(folder: Path) -> str:
    """The folder's name; of one in the hub's cache, which is named by its commit, OWNER/NAME."""
    folder = folder.absolute()
    if folder.parent.name != "snapshots":
        return folder.name
    return folder.parents[1].name.removeprefix("models--").replace("--", "/")


def _generation_key(prompt: Prompt) -> tuple[object, ...]:
    sampling = {name: getattr(prompt.sampling, name) for name in (*_SAMPLING, "seed")}
    return ("text", prompt.tokens, prompt.max_new_tokens, prompt.stop_strings, sampling)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _progress(answers: Iterable[_T], total: int, what: str, hidden: bool) -> Iterable[_T]:
    bar: Iterable[_T] = tqdm(answers, total=total, desc=what, disable=hidden)
    return bar


def _check_placement(
    batch_size: int | str, max_batch_size: int | str | None, device: str | None
) -> None:
    if str(batch_size) not in ("1", "auto") or str(max_batch_size) not in ("None", "1"):
        raise EvaluationError(f"batch_size is {batch_size}; a bundle runs one sequence at a time")
    if device not in (None, "", "cpu"):
        raise EvaluationError(f"device is {device!r}; a bundle runs where its target does")
