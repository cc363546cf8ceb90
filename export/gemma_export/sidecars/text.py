"""What an export needs of the tokenizer, which itself takes half a gigabyte: read, and let go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.memory import release_memory
from gemma_export.progress import Reporter
from gemma_export.quantize.calibrate.text import Calibration, load_calibration
from gemma_export.sidecars.phone_files import PhoneFile, phone_files
from gemma_export.sidecars.prompts import golden_prompts
from gemma_runtime.errors import CheckpointError
from gemma_runtime.manifest import LayerCache
from gemma_runtime.proof.teacher import encode_segments, read_segments

_TURN_END, _END = "<end_of_turn>", "<eos>"


@dataclass(frozen=True, slots=True)
class ExportText:
    """Texts as token ids, and the tokenizer's files."""

    files: TokenizerFiles | None  # random weights have none
    prompts: Mapping[str, list[int]]  # of the goldens
    segments: Mapping[str, list[int]]  # of --eval-text
    turn_end: int | None
    phone_files: Mapping[str, PhoneFile]  # by role
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class WantedText:
    """What is to be encoded beside the goldens."""

    evaluation: Path | None = None
    is_calibrated: bool = False
    calibration: Path | None = None  # the user's own instead of ours


def read_text(
    checkpoint: Checkpoint,
    context_length: int,
    layouts: Sequence[Sequence[LayerCache]],
    wanted: WantedText,
    report: Reporter,
) -> ExportText:
    """Encode all there is to encode, and let the tokenizer go."""
    texts = read_segments(wanted.evaluation) if wanted.evaluation else {}
    files = checkpoint.tokenizer()
    encoder = _load_encoder(checkpoint, files) if files else None
    prompts = golden_prompts(checkpoint.config, encoder, context_length, layouts)
    turn_end = encoder.token_to_id(_TURN_END) if encoder else None
    segments = _encode_segments(checkpoint, encoder, texts, context_length) if texts else {}
    calibration = None
    if wanted.is_calibrated:
        calibration = load_calibration(checkpoint.config, encoder, wanted.calibration)
    bos = encoder.id_to_token(checkpoint.config.bos_token) if encoder else None
    del encoder
    release_memory()
    phones = phone_files(files, bos or "", _END, report) if files else {}
    release_memory()
    return ExportText(files, prompts, segments, turn_end, phones, calibration)


def _encode_segments(
    checkpoint: Checkpoint,
    encoder: Tokenizer | None,
    texts: Mapping[str, str],
    context_length: int,
) -> dict[str, list[int]]:
    """As the runtime encodes them, or the teacher would not be found again."""
    if encoder is None:
        raise CheckpointError(f"{checkpoint.id} has no tokenizer, so --eval-text can't be read")

    def encode(text: str) -> list[int]:
        return list(encoder.encode(text, add_special_tokens=False).ids)

    encoder.encode_special_tokens = True
    try:
        return encode_segments(texts, encode, checkpoint.config.bos_token, context_length)
    finally:
        encoder.encode_special_tokens = False  # calibration text may hold control tokens


def _load_encoder(checkpoint: Checkpoint, files: TokenizerFiles) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(files.tokenizer_json)
    except Exception as error:  # what tokenizers raises has no type of its own
        raise CheckpointError(f"{checkpoint.id}: tokenizer.json can't be read: {error}") from error
