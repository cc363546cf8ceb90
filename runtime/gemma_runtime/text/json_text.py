"""Reads JSON strictly, as RFC 8259 has it: the phone apps accept and refuse the same texts."""

import json
import math
from collections.abc import Sequence
from typing import NoReturn

from gemma_runtime.text.tools import Json

_MAX_STARTS = 64  # each attempt to extract may read to the end of the text


def parse_json(text: str) -> Json:
    """The value of a JSON text.

    Raises ValueError for anything else, also for names that occur twice, numbers too large for a
    double, unpaired surrogates, and nesting that Python can't read.
    """
    return _read(text, 0, whole=True)


def extract_json(text: str) -> Json:
    """The whole text as JSON, or the first object or array in it. Raises ValueError."""
    try:
        return parse_json(text)
    except ValueError as error:
        failure = error
    starts = [at for at, character in enumerate(text) if character in "{["][:_MAX_STARTS]
    for start in starts:
        try:
            return _read(text, start, whole=False)
        except ValueError:
            continue
    raise failure


def _read(text: str, start: int, whole: bool) -> Json:
    try:
        value = _DECODER.decode(text) if whole else _DECODER.raw_decode(text, start)[0]
        json.dumps(value, ensure_ascii=False).encode()  # fails for an unpaired surrogate
    except RecursionError as error:
        raise ValueError("the nesting is too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("an unpaired surrogate") from error
    return value


def _object(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return fields


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a double")
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_constant=_refuse, strict=True
)
