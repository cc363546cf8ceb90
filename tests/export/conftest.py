"""Tiny checkpoints, exports and calibrations that the exporter's tests share."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemma_export.checkpoint.folder import FolderCheckpoint, open_folder
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import TABLE, GemmaConfig, is_gain
from gemma_export.model.decoder import decoder
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter, Stage, Tick, unheard
from gemma_export.quantize.calibrate.flow import RESIDUAL
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.recipe import Recipe, find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_export.targets import Options
from gemma_runtime.bundle import Bundle
from gemma_runtime.session import open_session
from tests.export.models import (
    GEMMA1,
    GEMMA2,
    SHORT_GEMMA2,
    SHORT_GEMMA3,
    TINIES,
    Tiny,
    eager_logits,
    save_tiny,
)
from tests.shared import shared_folder


@dataclass(frozen=True)
class TinyCheckpoint:
    tiny: Tiny
    folder: Path
    model: PreTrainedModel

    def open(self) -> FolderCheckpoint:
        return open_folder(self.folder)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a cache apart from the user's, and one thread: more threads slow tiny models down.

    All workers share this cache, so that each store is built once.
    """
    os.environ["GEMMA_EXPORT_CACHE"] = str(shared_folder(tmp_path_factory, "cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=TINIES, ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """Each kind of tiny checkpoint in turn."""
    return saved(request.param, tmp_path_factory)


def saved(tiny: Tiny, factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """The model in a new folder."""
    folder = factory.mktemp(tiny.name)
    return TinyCheckpoint(tiny, folder, save_tiny(tiny, folder))


@pytest.fixture(scope="session")
def short_gemma2(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return saved(SHORT_GEMMA2, tmp_path_factory)


@pytest.fixture(scope="session")
def short_gemma3(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return saved(SHORT_GEMMA3, tmp_path_factory)


def only(*tinies: Tiny) -> pytest.MarkDecorator:
    """Run an expensive test with these kinds only; tests/README.md lists what covers the others."""
    names = [tiny.name for tiny in tinies]
    return pytest.mark.parametrize("tiny", tinies, indirect=True, ids=names)


Export = Callable[..., Bundle]


def export_folder(
    folder: Path,
    quant: str | Recipe,
    output: Path,
    context: int = 128,
    full_cache: bool = False,
    target: str = "onnx",
    prefill: int = 24,
    options: Options | None = None,
    cache: str | None = None,
) -> Bundle:
    """Export a folder with a recipe, or one of that name."""
    request = ExportRequest(
        targets=(target,),
        recipe=quant if isinstance(quant, Recipe) else find_recipe(quant),
        checkpoint=str(folder),
        context_length=context,
        prefill_length=min(prefill, context),
        full_cache=full_cache,
        cache=cache,
        options=options or {},
        output=output,
    )
    (result,) = export_bundles(request, QuietReporter())
    return result.bundle


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export_folder`, into a new folder for each call."""

    def run(folder: Path, quant: str, **settings: Any) -> Bundle:
        output = tmp_path_factory.mktemp("bundles") / "bundle"
        return export_folder(folder, quant, output, **settings)

    return run


def check_exact(bundle: Bundle, tiny: TinyCheckpoint, tokens: list[int]) -> None:
    """`prefill`, `decode` and `score` give the float32 logits of transformers."""
    expected = eager_logits(tiny.model, tokens).numpy()
    with open_session(bundle, threads=1) as session:
        assert np.abs(session.prefill(tokens) - expected[-1]).max() <= 1e-4
        session.reset()
        single = np.stack([session.decode(token) for token in tokens])
        assert np.abs(single - expected).max() <= 1e-4
        session.reset()
        assert np.abs(session.score(tokens) - expected).max() <= 1e-4


def check_chunks(
    bundle: Bundle, tiny: TinyCheckpoint, tokens: list[int], lengths: Sequence[int], restart: int
) -> None:
    """Chunks of any lengths, with a reset before one of them, give the logits of transformers."""
    expected = eager_logits(tiny.model, tokens).numpy()
    with open_session(bundle, threads=1) as session:
        for index, length in enumerate(lengths):
            if index == restart or session.position + length > len(tokens):
                session.reset()
            start = session.position
            logits = session.prefill(tokens[start : start + length])
            assert np.abs(logits - expected[start + length - 1]).max() <= 1e-4


def check_loud(bundle: Bundle, loud: TinyCheckpoint, tokens: list[int], near: float) -> None:
    """The bundle scales residuals beyond float16, and its logits are close to float32's."""
    assert bundle.manifest.headroom.factor < 1
    with open_session(bundle) as session:
        logits = session.score(tokens)
    assert np.abs(logits - eager_logits(loud.model, tokens).numpy()).max() < near


LOUD = pytest.mark.parametrize("kind", [GEMMA2, GEMMA1], ids=lambda kind: kind.name)


def save_loud(folder: Path, kind: Tiny) -> TinyCheckpoint:
    """A tiny model whose residuals exceed float16's maximum, 65504, as Gemma 3's do."""
    model = kind.build()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if kind is GEMMA2 and "post_" in name and name.endswith("layernorm.weight"):
                weight.add_(20_000)
            if kind is GEMMA1 and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(40_000)
    model.save_pretrained(folder)
    return TinyCheckpoint(kind, folder, model)


def our_names(tiny: TinyCheckpoint) -> dict[str, str]:
    """Our names of the weights by those of transformers."""
    config = tiny.open().config
    return {config.hf_name(name): name for name in config.tensor_shapes()}


def dequantized(tiny: TinyCheckpoint, quant: str | Recipe) -> PreTrainedModel:
    """The transformers model with its weights replaced by the store's."""
    model = tiny.tiny.build()
    recipe = quant if isinstance(quant, Recipe) else find_recipe(quant)
    store = open_or_build_store(tiny.open(), recipe)
    names = our_names(tiny)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = store.weight(names[name]).rows(0, parameter.shape[0])
            parameter.copy_(values + 1 if tiny.tiny.plain_gains and is_gain(name) else values)
    return model


RandomText = Callable[[str, int], Workspace]


@pytest.fixture
def random_text(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RandomText:
    """Makes a workspace for a recipe and a number of random sequences longer than the window.

    Each test has a cache of its own.
    """
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path))

    def workspace(recipe: str, sequences: int) -> Workspace:
        draw = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, 96, (sequences, 24), generator=draw)
        return Workspace(tiny.open(), find_recipe(recipe), Calibration("test", tokens))

    return workspace


def head_inputs(residuals: Path, config: GemmaConfig, gain: Tensor) -> Tensor:
    """The inputs of the output projection, after the final norm: (B · T, M)."""
    file = SafetensorsFile(residuals)
    x = file.rows(RESIDUAL, 0, file.tensors[RESIDUAL].shape[0]).flatten(0, 1)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + gain, config.rms_norm_eps)


def stages(tick: Tick) -> Stage:
    """A progress reporter that gives `tick` to every stage."""

    @contextmanager
    def stage(title: str, total_bytes: int) -> Iterator[Tick]:
        del title, total_bytes
        yield tick

    return stage


class Notes(QuietReporter):
    """Collects the notes of an export."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def calibrated_store(work: Workspace, tick: Tick = unheard) -> QuantizedStore:
    rounded = CalibratedWeights(work, stages(tick))
    return open_or_build_store(work.checkpoint, work.recipe, None, rounded)


def mean_kl(expected: Tensor, actual: Tensor) -> float:
    """Mean KL, in nats per token, from logits (…, V) to others."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (expected, actual))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def divergence(
    work: Workspace, weight: Callable[[str], Tensor], factors: Tensor | None = None
) -> float:
    """Mean KL, in nats per token, from the float model to one with other weights.

    The text is the calibration text. `factors` are the table's column factors.
    """
    config, tokens = work.checkpoint.config, work.calibration.tokens
    shapes = config.tensor_shapes()
    exact = hold({name: work.checkpoint.rows(name, 0, shape[0]) for name, shape in shapes.items()})
    other = hold({name: weight(name) for name in shapes})
    other[TABLE] = replace(other[TABLE], factors=factors)
    with torch.inference_mode():
        reference, changed = (
            decoder(BatchOps(tokens, config.rms_norm_eps), config, weights.__getitem__)
            for weights in (exact, other)
        )
    return mean_kl(reference, changed)


def store_divergence(work: Workspace, store: QuantizedStore) -> float:
    """`divergence` of a model with the store's weights."""
    factors = store.weight(TABLE).factors
    return divergence(work, lambda name: store.weight(name).rows(0, store.shapes[name][0]), factors)
