"""Computes everything that needs the tokenizer first, so that its 0.5 GB can be freed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.memory import release_memory
from gemma_export.progress import Reporter
from gemma_export.quantize.calibrate.text import Calibration, load_calibration
from gemma_export.sidecars.phone_files import PhoneFile, phone_files
from gemma_export.sidecars.prompts import golden_prompts
from gemma_export.sidecars.stop_tokens import find_stop_tokens
from gemma_export.sidecars.turns import with_turns
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.manifest import LayerCache
from gemma_runtime.proof.texts import encode_segments, read_segments


@dataclass(frozen=True, slots=True)
class ExportText:
    """All texts as token ids, and the tokenizer's files."""

    files: TokenizerFiles | None  # None for random weights
    prompts: Mapping[str, list[int]]  # for the goldens, by name
    segments: Mapping[str, list[int]]  # of --eval-text, by name
    eos_token: int | None  # what the chat template may write as `eos_token`
    stop_tokens: tuple[int, ...]
    phone_files: Mapping[str, PhoneFile]  # by role
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class WantedText:
    """The texts to encode besides the goldens."""

    evaluation: Path | None = None  # of --eval-text
    is_calibrated: bool = False
    calibration: Path | None = None  # the user's text; None selects ours


def read_text(
    checkpoint: Checkpoint,
    context_length: int,
    layouts: Sequence[Sequence[LayerCache]],
    sources: WantedText,
    report: Reporter,
) -> ExportText:
    """Encode all texts, then free the tokenizer."""
    texts = read_segments(sources.evaluation) if sources.evaluation else {}
    files = without_training_state(checkpoint.tokenizer())
    if files:
        _report_notes(checkpoint, files, report)
    encoder = load_encoder(checkpoint, files) if files else None
    files = with_turns(files, encoder) if files and encoder else files
    prompts = golden_prompts(checkpoint.config, encoder, context_length, layouts)
    eos = encoder.token_to_id(files.eos) if encoder and files else None
    stops = find_stop_tokens(checkpoint, files, encoder, report)
    segments = _encode_segments(checkpoint, encoder, texts, context_length) if texts else {}
    calibration = None
    if sources.is_calibrated:
        calibration = load_calibration(checkpoint.config, encoder, sources.calibration)
    bos = encoder.id_to_token(checkpoint.config.bos_token) if encoder else None
    del encoder
    release_memory()
    phones = phone_files(files, bos or "", files.eos, report) if files else {}
    release_memory()
    return ExportText(files, prompts, segments, eos, stops, phones, calibration)


@dataclass(frozen=True, slots=True)
class _TrainingState:
    truncation: object = None
    padding: object = None


def without_training_state(files: TokenizerFiles | None) -> TokenizerFiles | None:
    """The files without the truncation and padding that a trainer saved in `tokenizer.json`.

    They would cut texts and fill them with `<pad>`, here and in every program that reads the file.
    """
    if files is None:
        return None
    try:
        state = decode_json(files.tokenizer_json, _TrainingState)
    except msgspec.DecodeError:
        return files  # `load_encoder` says what is wrong with it
    if state == _TrainingState():
        return files
    content = decode_json(files.tokenizer_json, dict[str, msgspec.Raw])
    content |= {"truncation": msgspec.Raw(b"null"), "padding": msgspec.Raw(b"null")}
    return replace(files, tokenizer_json=msgspec.json.encode(content))


def _report_notes(checkpoint: Checkpoint, files: TokenizerFiles, report: Reporter) -> None:
    for note in files.notes:
        report.note(note)
    if files.chat_template is None:
        report.note(f"{checkpoint.id} has no chat template; chats use Gemma's own turns")


def _encode_segments(
    checkpoint: Checkpoint,
    encoder: Tokenizer | None,
    texts: Mapping[str, str],
    context_length: int,
) -> dict[str, list[int]]:
    """Encode segments as the runtime does, because it looks them up by their token ids."""
    if encoder is None:
        raise CheckpointError(f"{checkpoint.id} has no tokenizer, so --eval-text can't be encoded")

    def encode(text: str) -> list[int]:
        return list(encoder.encode(text, add_special_tokens=False).ids)

    encoder.encode_special_tokens = True
    try:
        return encode_segments(texts, encode, checkpoint.config.bos_token, context_length)
    finally:
        encoder.encode_special_tokens = False  # calibration text may contain control tokens


def load_encoder(checkpoint: Checkpoint, files: TokenizerFiles) -> Tokenizer:
    """The tokenizer. Raises CheckpointError if its file can't be read."""
    try:
        return Tokenizer.from_buffer(files.tokenizer_json)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{checkpoint.id}: tokenizer.json can't be read: {error}") from error
