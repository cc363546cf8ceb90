from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gemma_export.checkpoint.folder import FolderCheckpoint, open_folder
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.bundle import Bundle
from tests.export.models import TINIES, Tiny, save_tiny


@dataclass(frozen=True)
class TinyCheckpoint:
    tiny: Tiny
    folder: Path
    model: PreTrainedModel

    def open(self) -> FolderCheckpoint:
        return open_folder(self.folder)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stores of tests never meet the user's; one thread, since tiny work only pays for more."""
    import os

    os.environ["GEMMA_EXPORT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=TINIES, ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """Every kind of tiny checkpoint in turn."""
    folder = tmp_path_factory.mktemp(request.param.name)
    return TinyCheckpoint(request.param, folder, save_tiny(request.param, folder))


Export = Callable[..., Bundle]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a folder with a named recipe."""

    def run(
        folder: Path,
        quant: str,
        context: int = 128,
        full_cache: bool = False,
        target: str = "onnx",
        prefill: int = 24,
    ) -> Bundle:
        request = ExportRequest(
            targets=(target,),
            recipe=find_recipe(quant),
            checkpoint=str(folder),
            context_length=context,
            prefill_length=min(prefill, context),
            full_cache=full_cache,
            output=tmp_path_factory.mktemp("bundles") / "bundle",
        )
        (result,) = export_bundles(request, QuietReporter())
        return result.bundle

    return run


def dequantized(tiny: TinyCheckpoint, quant: str) -> PreTrainedModel:
    """transformers' model with the store's weights in place of its own."""
    model = tiny.tiny.build()
    store = open_or_build_store(tiny.open(), find_recipe(quant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(store.weight(name).rows(0, parameter.shape[0]))
    return model
