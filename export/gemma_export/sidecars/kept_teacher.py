"""Keeps what the float32 weights say of an evaluation text, for other exports of the checkpoint.

A pass over the weights for each few segments can take longer than the export itself, and bundles of
other recipes and targets need the same numbers.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch

from gemma_export.cache_lock import exclusive
from gemma_export.checkpoint import Checkpoint
from gemma_export.computing import CPU
from gemma_export.digest import digest_of
from gemma_export.progress import Note, Stage
from gemma_export.sidecars.teacher import passes, record_teacher
from gemma_runtime.cache import ABOUT, TEACHERS, About, cache_folder
from gemma_runtime.errors import BundleError
from gemma_runtime.proof.teacher import (
    TEACHER,
    TOP,
    TeacherSegment,
    load_teacher,
    save_teacher,
)
from gemma_runtime.staging import staged_file

_VERSION = 1  # increase it when the teacher's numbers change


def kept_teacher(
    checkpoint: Checkpoint,
    segments: Mapping[str, list[int]],
    stage: Stage,
    note: Note,
    device: torch.device = CPU,
) -> list[TeacherSegment]:
    """The teacher's probabilities for these segments (name → token ids): kept ones, or new ones.

    Another process that records the same is waited for. A damaged file is recorded again.
    """
    folder = teacher_folder(checkpoint, segments, device)
    with exclusive(folder, f"evaluating {checkpoint.id}", note):
        if (found := _load(folder / TEACHER)) is None:
            total = checkpoint.config.parameters * 4 * passes(list(segments))
            with stage("teacher", total) as tick:
                found = record_teacher(checkpoint, segments, tick, device)
            about = About(checkpoint.id, "", f"{len(segments)} texts to evaluate on")
            with staged_file(folder / TEACHER) as partial:
                save_teacher(partial, found)
            (folder / ABOUT).write_bytes(msgspec.json.encode(about))
        os.utime(folder / TEACHER)  # `gemma-export cache` shows the time of the last use
    return found


def teacher_folder(
    checkpoint: Checkpoint, segments: Mapping[str, list[int]], device: torch.device = CPU
) -> Path:
    key = (_VERSION, TOP, checkpoint.digest(), list(segments.items()))
    own = () if device == CPU else (device.type,)  # float32 sums in another order
    return cache_folder() / TEACHERS / digest_of((*key, *own))[:32]


def _load(path: Path) -> list[TeacherSegment] | None:
    if not path.exists():
        return None
    try:
        return list(load_teacher(path).values())
    except BundleError:
        return None
