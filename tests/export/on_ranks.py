"""What tests run in processes that torchrun starts, and in their own to compare with.

`python -m tests.export.on_ranks FUNCTION ARGUMENTS`. It doesn't import transformers, since each
rank would.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from gemma_export import cli, shards
from gemma_export.checkpoint.folder import open_folder
from gemma_export.model.config import GemmaConfig, LayerSpec
from gemma_export.parallel import one_thread_each
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.calibrate import layers
from gemma_export.quantize.calibrate.budget import Budget, spend_budget
from gemma_export.quantize.calibrate.layer_files import FlowFiles
from gemma_export.quantize.calibrate.stream import advance_flow
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.recipe import Recipe, find_recipe, write_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.errors import GemmaError

_SEQUENCES = 19  # eight pieces of two or three, and two steps of distillation
_EVERYWHERE = Recipe("everywhere", find_recipe("int4-gptq").rules[-1:])  # gptq, by its last rule


def compute(folders: str) -> dict[str, str]:
    """The digests of codes, and the recipe of a budget, for each of the folders' checkpoints."""
    found: dict[str, str] = {}
    with shards.joined("cpu"), one_thread_each():
        for folder in folders.split(","):
            named = map(find_recipe, ("int8-smooth", "int4-distilled"))
            for recipe in (_EVERYWHERE, *named):
                found[f"{Path(folder).name} {recipe.name}"] = _codes(Path(folder), recipe)
            found[f"{Path(folder).name} bits"] = _bits(Path(folder))
    return found


def _work(folder: Path, recipe: Recipe) -> Workspace:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 96, (_SEQUENCES, 24), generator=draw)
    return Workspace(open_folder(folder), recipe, Calibration("test", tokens))


def _codes(folder: Path, recipe: Recipe) -> str:
    work = _work(folder, recipe)
    rounded = CalibratedWeights(work, QuietReporter().stage)
    return open_or_build_store(work.checkpoint, work.recipe, None, rounded).codes_digest


def _bits(folder: Path) -> str:
    budget = Budget(find_recipe("int4-gptq"), 6.0)
    work = _work(folder, budget.base)
    args = budget, work.checkpoint, work.calibration, QuietReporter().stage
    losses = [*work.losses, work.table_losses]
    recipe = write_recipe(spend_budget(*args, splits_table=True))
    return recipe + "".join(path.read_bytes().hex() for path in losses)


def write_computed(folders: str, output: str) -> None:
    """Write what `compute` finds on all ranks, and how they refuse a recipe that isn't shared."""
    found = compute(folders)
    folder = folders.split(",")[0]
    request = ExportRequest(("onnx",), find_recipe("int8"), folder, output=Path(output))
    try:
        export_bundles(request)
    except GemmaError as error:
        found["refusal"] = str(error)
    except SystemExit:  # of another rank
        return
    if shards.is_first():
        Path(output).write_text(json.dumps(found))


def export(fault: str, *arguments: str) -> None:
    """`gemma-export`, in which rank 1 ends in some way before it runs the second layer."""

    def advance(
        files: FlowFiles, config: GemmaConfig, layer: LayerSpec, weights: Mapping[str, Tensor]
    ) -> None:
        if shards.rank() == 1 and layer.index == 1:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "residual")
        advance_flow(files, config, layer, weights)

    with mock.patch.object(layers, "advance_flow", advance):
        sys.exit(cli.run(list(arguments)))


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    export(*given) if name == "export" else write_computed(*given)
