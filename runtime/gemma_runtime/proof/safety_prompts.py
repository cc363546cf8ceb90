"""Reads files of prompts: one a line, or JSON lines with `prompt`, maybe `id` and `harmless`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gemma_runtime.errors import EvaluationError
from gemma_runtime.formats.json_bytes import decode_json


@dataclass(frozen=True, slots=True)
class SafetyPrompt:
    id: str
    text: str
    harmless: bool = False  # a model should answer it


def read_prompts(path: Path, harmless: bool = False) -> list[SafetyPrompt]:
    """The prompts of a file; `harmless` is what lines are that don't say it themselves.

    Ids are those of the file, else `NAME:LINE`. Raises EvaluationError with the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 at byte {error.start}") from error
    prompts = list(_prompts(path, lines, harmless))
    if not prompts:
        raise EvaluationError(f"{path} has no prompts; expected one a line")
    return prompts


def check_ids(prompts: Sequence[SafetyPrompt]) -> None:
    """Raise EvaluationError if two prompts have one id."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise EvaluationError(f"two prompts have the id {prompt.id!r}; rename one")
        seen.add(prompt.id)


def _prompts(path: Path, lines: list[str], harmless: bool) -> Iterator[SafetyPrompt]:
    is_json = path.suffix == ".jsonl"
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        if is_json:
            yield _from_json(where, line, harmless)
        else:
            yield SafetyPrompt(where, line.strip(), harmless)


def _from_json(where: str, line: str, harmless: bool) -> SafetyPrompt:
    try:
        fields: dict[str, Any] = decode_json(line, dict[str, Any])
    except msgspec.DecodeError as error:
        raise EvaluationError(f"{where} is not a JSON object: {error}") from error
    text, name = fields.get("prompt"), fields.get("id", where)
    own = fields.get("harmless", harmless)
    if not isinstance(text, str) or not text.strip():
        raise EvaluationError(f"{where}: prompt is {text!r:.40}, expected a text")
    if not isinstance(name, str | int) or not isinstance(own, bool):
        raise EvaluationError(f"{where}: expected id as a text and harmless as true or false")
    return SafetyPrompt(str(name), text, own)
