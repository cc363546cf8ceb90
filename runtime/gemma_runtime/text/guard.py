"""Guards: models that say whether a prompt or a reply violates a policy.

`Guard` runs a ShieldGemma bundle: Gemma 2, trained to answer Yes or No about one policy at a time
(arXiv 2407.21772). Its prompt is that of the chat template in Google's checkpoints
(`google/shieldgemma-2b`), the policies are those of the model card and of Google's cookbook
(`responsible/shieldgemma_on_huggingface.ipynb`), word by word: the model was trained on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import ContextFull, SessionError, TokenizerError
from gemma_runtime.session import Logits, open_session
from gemma_runtime.text.fork import Fork, shared_beginning
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer

_START, _END = "<start_of_turn>", "<end_of_turn>"
_ANSWERS = ("Yes", "No")


class ContentGuard(Protocol):
    """What checks a chat: `Guard`, or an app's own model or rules."""

    @property
    def threshold(self) -> float:
        """Probability from which a policy counts as violated."""
        ...

    def check(self, prompt: str, reply: str | None = None) -> Mapping[str, float]:
        """Each policy's probability of being violated: by the prompt, or by the reply to it."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """What content may not do: completes "shall not generate content that …"."""

    name: str
    content: str

    def guideline(self, *, of_reply: bool) -> str:
        """The policy's sentence, about a reply or about a prompt."""
        wanted = (
            "The chatbot shall not generate content that"
            if of_reply
            else "The prompt shall not contain or seek generation of content that"
        )
        return f'"No {self.name}": {wanted} {self.content}'


SHIELD_POLICIES = (
    Policy(
        "Dangerous Content",
        "harming oneself and/or others (e.g., accessing or building firearms and explosive "
        "devices, promotion of terrorism, instructions for suicide).",
    ),
    Policy(
        "Harassment",
        "is malicious, intimidating, bullying, or abusive content targeting another individual "
        "(e.g., physical threats, denial of tragic events, disparaging victims of violence).",
    ),
    Policy(
        "Hate Speech",
        "targeting identity and/or protected attributes (e.g., racial slurs, promotion of "
        "discrimination, calls to violence against protected groups) or "
        "dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, "
        "age, nationality, veteran status, sexual orientation, gender, gender identity, caste, or "
        "any other protected status. We do allow content that includes a reference to a protected "
        "individual or group in a positive manner.",
    ),
    Policy(
        "Sexually Explicit Information",
        "contains references to sexual acts or other lewd content (e.g., sexually graphic "
        "descriptions, content aimed at causing arousal). Medical or scientific terms related to "
        "human anatomy or sex education are permitted.",
    ),
)


class Guard:
    """Scores a prompt or a reply with a ShieldGemma bundle: one prefill, no generated token.

    A second session in the process, so its memory adds to the chat model's.
    """

    def __init__(
        self,
        bundle: Bundle,
        policies: Sequence[Policy] = SHIELD_POLICIES,
        threshold: float = 0.5,
        threads: int | None = None,
    ) -> None:
        """Load the bundle. Raises TokenizerError if its vocabulary lacks what the prompt needs."""
        if not policies:
            raise SessionError("a guard needs at least one policy")
        if not 0 < threshold <= 1:
            raise SessionError(f"the guard's threshold is {threshold:g}, expected above 0, up to 1")
        self.threshold = threshold
        self._bundle = bundle
        self._policies = tuple(policies)
        self._tokenizer = load_tokenizer(bundle)
        self._answers = [_token(self._tokenizer, answer) for answer in _ANSWERS]
        for piece in (_START, _END):
            _token(self._tokenizer, piece)
        self._session = open_session(bundle, threads)

    def check(self, prompt: str, reply: str | None = None) -> Mapping[str, float]:
        """The probability of each policy being violated, by its name.

        That of the reply, if there is one, else that of the prompt: the softmax over the logits
        of "Yes" and "No" after the model card's prompt. What the policies share is fed once.
        Raises ContextFull if a text is too long for the guard's context.
        """
        prompts = [self._encode(policy, prompt, reply) for policy in self._policies]
        longest, context = max(map(len, prompts)), self._session.context_length
        if longest > context:
            raise ContextFull(
                f"{self._bundle.directory}: the text and a policy have {longest} tokens, the "
                f"guard's context holds {context}; shorten the text, or export the guard with a "
                "larger --context"
            )
        shared = shared_beginning(prompts)
        fork = Fork(self._session, prompts[0][:shared])
        logits = [fork.back().prefill(tokens[shared:])[self._answers] for tokens in prompts]
        names = [policy.name for policy in self._policies]
        return dict(zip(names, map(_first_of_two, logits), strict=True))

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _encode(self, policy: Policy, prompt: str, reply: str | None) -> list[int]:
        ids = [self._bundle.manifest.bos_token]
        for part in shield_prompt(policy, prompt, reply):
            is_control = part in (_START, _END)
            ids += self._tokenizer.encode(part, control=is_control)
        return ids


def violated(guard: ContentGuard, scores: Mapping[str, float]) -> dict[str, float]:
    """The policies that count as violated, likeliest first. A score of NaN counts too."""
    found = {name: score for name, score in scores.items() if not score < guard.threshold}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def shield_prompt(policy: Policy, prompt: str, reply: str | None = None) -> list[str]:
    """ShieldGemma's prompt in parts: a control token's name alone, and the text between them.

    Encode the text without control tokens, so that the names of some in it stay text.
    """
    of_reply = reply is not None
    subject, judged = (
        ("an AI response to a prompt", "Chatbot Response")
        if of_reply
        else ("a user prompt", "human question")
    )
    must = "must  start" if of_reply else "must start"  # the two blanks are Google's
    turns = [_START, f"\nHuman Question: {prompt}\n", _END]
    if reply is not None:
        turns += ["\n", _START, f"\nChatbot Response: {reply}\n", _END]
    return [
        f"You are a policy expert trying to help determine whether {subject} is in violation of "
        "the defined safety policies.\n\n",
        *turns,
        "\n\nOur safety principle is defined in the below:\n\n"
        f"* {policy.guideline(of_reply=of_reply)}\n"
        "\n===\n\n"
        f"Does the {judged} violate the above principle? Your answer {must} with 'Yes' or 'No'. "
        "And then walk through step by step to be sure we answer correctly.\n\n",
    ]


def _token(tokenizer: Tokenizer, piece: str) -> int:
    token = tokenizer.token_id(piece)
    if token is None:
        raise TokenizerError(
            f"the guard's vocabulary has no {piece!r}; give a bundle of ShieldGemma as the guard"
        )
    return token


def _first_of_two(logits: Logits) -> float:
    """The softmax's first value of two logits, (2,)."""
    yes, no = (float(logit) for logit in logits)
    return float(1 / (1 + np.exp(np.clip(no - yes, -700, 700))))
