"""What the phone apps' reports hold: their figures of one bundle.

`device` has the phone's name, its system, the runtime and app with their versions, and its
condition: `start_battery_percent`, `start_charging`, `start_power_save` and `start_thermal_status`,
and the same of the `end`. Earlier apps for iOS wrote sentences, `condition_before` and
`condition_after`.
"""

import re
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


# Android's numbers of how hot a phone is. iOS has words.
_ANDROID = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
_THERMAL = {str(number): word for number, word in enumerate(_ANDROID)}
_MOMENTS = {"start": "condition_before", "end": "condition_after"}


@dataclass(frozen=True, slots=True)
class PhoneCondition:
    """What a phone said of itself at one moment. What it didn't say is None."""

    thermal: str | None = None
    battery_percent: str | None = None
    charging: bool | None = None
    power_save: bool | None = None


@dataclass(frozen=True, slots=True)
class PhoneReport:
    """What was not measured is None."""

    device: dict[str, str]
    bundle: str
    digest: str  # `Bundle.digest`
    verify: PhoneVerdict | None = None
    bench: PhoneBench | None = None
    sustained: PhoneSustained | None = None

    def condition(self, moment: str) -> PhoneCondition:
        """Of the `start` or the `end`."""
        if (sentence := self.device.get(_MOMENTS[moment])) is not None:
            return _condition(sentence)
        told = {name: self.device.get(f"{moment}_{name}") for name in _CONDITION}
        thermal = told["thermal_status"]
        return PhoneCondition(
            thermal=_THERMAL.get(thermal or "", thermal),
            battery_percent=told["battery_percent"],
            charging=_truth(told["charging"]),
            power_save=_truth(told["power_save"]),
        )

    def facts(self) -> dict[str, str]:
        """What doesn't change while the app measures."""
        moments = tuple(f"{moment}_" for moment in _MOMENTS)
        return {
            name: value
            for name, value in sorted(self.device.items())
            if name not in _MOMENTS.values() and not name.startswith(moments)
        }


_CONDITION = ("battery_percent", "charging", "power_save", "thermal_status")


def _condition(sentence: str) -> PhoneCondition:
    """`nominal, 80 %, plugged in, low power mode`; the battery is left out if it is not known."""
    battery = re.search(r"(\d+) %", sentence)
    return PhoneCondition(
        thermal=sentence.partition(",")[0],
        battery_percent=battery[1] if battery else None,
        charging="plugged in" in sentence if battery else None,
        power_save="low power mode" in sentence,
    )


def _truth(text: str | None) -> bool | None:
    return {"true": True, "false": False}.get(text or "")
