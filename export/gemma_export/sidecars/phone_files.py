"""The files that phones read instead of `tokenizer.json` and a Jinja template."""

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
    """The files by role. One that can't represent this checkpoint is left out, with a note."""
    makers: Mapping[str, tuple[str, Callable[[], bytes]]] = {
        "tokenizer_compact": ("tokenizer.gtok", lambda: compact_tokenizer(files.tokenizer_json)),
        "chat_format": (
            "chat.json",
            lambda: chat_format(files.chat_template, bos, eos).to_json(),
        ),
    }
    written: dict[str, PhoneFile] = {}
    for role, (name, make) in makers.items():
        try:
            written[role] = PhoneFile(name, make())
        except TokenizerError as error:
            report.note(f"{error}; the bundle gets no {name}, so the phone apps can't use it")
    return written
