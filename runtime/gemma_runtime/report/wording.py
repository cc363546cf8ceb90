"""Numbers as the page writes them."""

import math

from gemma_runtime.machine import format_bytes

ABSENT = "–"


def number(value: float | None, form: str = ".4g") -> str:
    """A number in Python's format `form`, with a real minus sign."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "not a number"
    return f"{value:{form}}".replace("-", "−")


def percent(value: float | None, form: str = ".1f") -> str:
    if value is None:
        return ABSENT
    return f"{number(100 * value, form)} %" if math.isfinite(value) else number(value)


def nats(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return number(value)
    return number(value, ".4f" if abs(value) >= 0.001 or value == 0 else ".1e")


def interval(difference: tuple[float, float, float], share: bool = False) -> str:
    """`+1.2 [0.3, 2.1]`, in per cent for shares."""
    scale, form = (100, "+.1f") if share else (1, "+.3f")
    middle, low, high = (number(scale * value, form) for value in difference)
    return f"{middle}{' %' if share else ''} [{low}, {high}]"


def count(value: float) -> str:
    """An integer with thin spaces, as digits are grouped in every language."""
    return f"{value:,}".replace(",", "\u202f")


def size(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return number(value)
    return format_bytes(value)


def milliseconds(value: float) -> str:
    return f"{number(value, '.0f' if value >= 100 else '.1f')} ms"


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927); (0, 1) without trials."""
    if trials <= 0:
        return 0.0, 1.0
    z2 = 1.959964**2
    share = min(max(hits / trials, 0.0), 1.0)
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))
    half = math.sqrt(spread) / (1 + z2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
