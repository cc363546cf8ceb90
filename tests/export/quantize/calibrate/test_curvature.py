"""Estimated losses predict the KL of rounding, and measuring resumes after an interruption."""

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from gemma_export.formats.codes import dequantize
from gemma_export.model.config import PER_LAYER_MATRICES, PER_LAYER_TABLE, TABLE
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate import curvature as measuring
from gemma_export.quantize.calibrate.curvature import measure_losses
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.round import round_rows
from tests.export.conftest import RandomText, divergence, only
from tests.export.models import DENSE, E2B, GEMMA2, TINIES


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int4", 64)


def _by_name(work: Workspace) -> dict[str, float]:
    losses = measure_losses(work, unheard)
    return {**losses.matrices, TABLE: losses.table[0]}


@only(*TINIES, E2B, DENSE)
@pytest.mark.parametrize(
    "part", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "table"]
)
def test_a_loss_predicts_the_kl_of_rounding_that_matrix_alone(work: Workspace, part: str) -> None:
    name = TABLE if part == "table" else f"model.layers.1.{part}.weight"
    losses = _by_name(work)
    fmt = work.formats()[name]
    shapes = work.checkpoint.config.tensor_shapes()
    rows = work.checkpoint.rows(name, 0, shapes[name][0])
    rounded = dequantize(round_rows(rows, fmt, "searched"), fmt)
    kl = divergence(
        work, lambda n: rounded if n == name else work.checkpoint.rows(n, 0, shapes[n][0])
    )
    assert kl / 2.5 < losses[name] < 2.5 * kl


@only(E2B)
def test_a_loss_predicts_the_kl_of_rounding_the_table_of_per_layer_embeddings(
    work: Workspace,
) -> None:
    """Looked up only; and what is not in 4 bits has no loss to spare."""
    name, losses = PER_LAYER_TABLE, _by_name(work)
    fmt, shapes = work.formats()[name], work.checkpoint.config.tensor_shapes()
    rows = work.checkpoint.rows(name, 0, shapes[name][0])
    rounded = dequantize(round_rows(rows, fmt, "searched"), fmt)
    kl = divergence(
        work, lambda n: rounded if n == name else work.checkpoint.rows(n, 0, shapes[n][0])
    )
    assert kl / 2.5 < losses[name] < 2.5 * kl
    assert not [n for n in losses if fnmatchcase(n, PER_LAYER_MATRICES)]


def test_losses_are_measured_with_the_rounding_of_the_recipe(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were those of plain rounding, but calibration lowers some losses more than others."""
    plain = _by_name(work)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    calibrated = _by_name(replace(work, recipe=find_recipe("int4-gptq")))
    ratios = {name: calibrated[name] / plain[name] for name in plain}
    assert sum(calibrated.values()) < 0.9 * sum(plain.values())
    assert max(ratios.values()) > 1.2 * min(ratios.values())


@only(GEMMA2)
def test_interrupted_measuring_resumes_and_gives_the_same_losses(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(name: str, done: int) -> None:
        del done
        if name == "layer 1, back":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_losses(work, stop)
    again: list[str] = []
    resumed = measure_losses(work, lambda name, done: again.append(name))
    assert set(again) == {"layer 0, back", "table, 0 int8 columns"}
    assert not [path for path in work.folder.iterdir() if not path.name.startswith("loss-")]
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    assert measure_losses(work, unheard) == resumed


def test_diagonal_blocks_of_the_curvature_give_similar_losses(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For wide matrices, only these blocks are kept."""
    full = _by_name(work)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(measuring, "WIDEST", 16)
    blocks = _by_name(work)
    assert blocks == pytest.approx(full, rel=0.5)
    assert blocks != full
