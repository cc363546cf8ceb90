"""Checks a request for an encoder, and chooses its recipe and context, without torch."""

from typing import TYPE_CHECKING

from gemma_export.checkpoint import Checkpoint
from gemma_export.choose import Choice, exact_choice
from gemma_export.model.config import GemmaConfig
from gemma_export.quantize.recipe import RECIPES
from gemma_export.request import ExportRequest, find_context
from gemma_export.targets import refuse_encoder
from gemma_runtime.errors import CheckpointError, RecipeError, TargetError

if TYPE_CHECKING:
    from gemma_export.checkpoint.sentence_folder import EncoderFiles

_DEFAULT_RECIPE = "int8"
_REASON = "vectors have no calibrated recipes, and of the quantized ones 8 bits lose least"
_LONGEST = 2048  # default context of models that name none: memory grows with its square


def choose_encoder_recipe(request: ExportRequest) -> Choice:
    """The request's own recipe, or else the usual one.

    Raises a GemmaError for what has no meaning for vectors.
    """
    for target in request.targets:
        refuse_encoder(target)
    given = {
        "--bits": request.bits,
        "--calibration": request.calibration,
        "--cache": request.cache,
        "--eval-text": request.eval_text,
        "--full-cache": request.full_cache or None,
        "--prefill": request.prefill_length,
    }
    for flag, value in given.items():
        if value is not None:
            raise TargetError(
                f"{flag} is for models that generate text, and this one gives vectors; leave it out"
            )
    if request.recipe is None and request.require_exact:
        return exact_choice()
    if request.recipe is None:
        return Choice(RECIPES[_DEFAULT_RECIPE], _REASON)
    if request.recipe.is_calibrated:
        plain = ", ".join(name for name, one in RECIPES.items() if not one.is_calibrated)
        raise RecipeError(
            f"recipe {request.recipe.name} is calibrated, which models that give vectors can't be "
            f"yet; choose from {plain}"
        )
    return Choice(request.recipe)


def encoder_context(
    request: ExportRequest, config: GemmaConfig, encoder: "EncoderFiles | None"
) -> int:
    """Most tokens of a text: what is asked for, or else what the checkpoint's own files say."""
    own = encoder.max_tokens if encoder is not None else None
    return find_context(request, config.max_position, own or _LONGEST)


def encoder_files(checkpoint: Checkpoint) -> "EncoderFiles | None":
    """What a folder says of vectors; None for random weights."""
    from gemma_export.checkpoint.folder import FolderCheckpoint
    from gemma_export.checkpoint.random import RandomCheckpoint

    if isinstance(checkpoint, FolderCheckpoint):
        return checkpoint.encoder
    if isinstance(checkpoint, RandomCheckpoint):
        return None
    raise CheckpointError(
        f"{checkpoint.id} gives vectors, and has adapters or is no folder; expected a "
        "sentence-transformers folder with the merged weights"
    )
