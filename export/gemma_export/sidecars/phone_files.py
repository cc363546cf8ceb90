"""What phones read in place of `tokenizer.json` and a Jinja template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.progress import Reporter
from gemma_export.sidecars.chat_format import chat_format
from gemma_export.sidecars.compact_tokenizer import compact_tokenizer
from gemma_runtime.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class PhoneFile:
    name: str  # path in the bundle
    content: bytes


def phone_files(
    files: TokenizerFiles, bos: str, eos: str, report: Reporter
) -> Mapping[str, PhoneFile]:
    """By role. What can't be written for this checkpoint is left out, and noted."""
    makers: Mapping[str, tuple[str, Callable[[], bytes]]] = {
        "tokenizer_compact": ("tokenizer.gtok", lambda: compact_tokenizer(files.tokenizer_json)),
        "chat_format": (
            "chat.json",
            lambda: chat_format(files.chat_template, bos, eos).to_json(),
        ),
    }
    made: dict[str, PhoneFile] = {}
    for role, (name, make) in makers.items():
        try:
            made[role] = PhoneFile(name, make())
        except TokenizerError as error:
            report.note(f"{error}; the bundle has no {name}, and the phone apps can't use it")
    return made
