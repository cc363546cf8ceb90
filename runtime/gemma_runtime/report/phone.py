"""What the phone apps' reports hold: their figures of one bundle."""

from dataclasses import dataclass

from gemma_runtime.manifest import Agreement
from gemma_runtime.measure.bench import PromptFigures, Spread


@dataclass(frozen=True, slots=True)
class PhoneVerdict:
    verdict: str
    failures: tuple[str, ...]
    lowering: Agreement


@dataclass(frozen=True, slots=True)
class PhoneSpeed:
    target: str
    load_ms: Spread
    prompts: tuple[PromptFigures, ...]
    decode_tokens_per_second: Spread
    token_p95_ms: Spread
    peak_rss_bytes: Spread | None = None


@dataclass(frozen=True, slots=True)
class PhoneBench:
    repeats: int
    new_tokens: int
    bundles: tuple[PhoneSpeed, ...]  # one
    threads: int | None = None  # None: the runtime decides


@dataclass(frozen=True, slots=True)
class PhoneSpan:
    """A few seconds of decoding, and what the phone said at its end."""

    seconds: float  # from the start to its end
    tokens_per_second: float
    thermal: str | None = None  # the system's word for how hot the phone is
    memory_bytes: int | None = None  # of the app


@dataclass(frozen=True, slots=True)
class PhoneSustained:
    sustained_minutes: float
    round_tokens: int
    prompt_tokens: int
    new_tokens: int
    first: float  # tokens per second in the first span
    last: float
    lowest: float
    spans: tuple[PhoneSpan, ...]


@dataclass(frozen=True, slots=True)
class PhoneReport:
    """What was not measured is None."""

    device: dict[str, str]
    bundle: str
    digest: str  # `Bundle.digest`
    verify: PhoneVerdict | None = None
    bench: PhoneBench | None = None
    sustained: PhoneSustained | None = None
