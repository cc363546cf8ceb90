"""What errors of outputs cost: the KL that it foretells, and taking the measuring up again."""

from dataclasses import replace
from pathlib import Path

import pytest

from gemma_export.formats.codes import dequantize
from gemma_export.model.config import TABLE
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate import curvature as measuring
from gemma_export.quantize.calibrate.curvature import measure_losses
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.round import round_rows
from tests.export.conftest import RandomText, divergence, only
from tests.export.models import GEMMA2


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int4", 64)


def _by_name(work: Workspace) -> dict[str, float]:
    losses = measure_losses(work, unheard)
    return {**losses.matrices, TABLE: losses.table[0]}


@pytest.mark.parametrize(
    "part", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "table"]
)
def test_losses_foretell_the_kl_of_a_matrix_rounded_alone(work: Workspace, part: str) -> None:
    name = TABLE if part == "table" else f"model.layers.1.{part}.weight"
    losses = _by_name(work)
    form = work.formats()[name]
    shapes = work.checkpoint.config.tensor_shapes()
    rows = work.checkpoint.rows(name, 0, shapes[name][0])
    rounded = dequantize(round_rows(rows, form, "searched"), form)
    found = divergence(
        work, lambda n: rounded if n == name else work.checkpoint.rows(n, 0, shapes[n][0])
    )
    assert found / 2.5 < losses[name] < 2.5 * found


def test_losses_are_of_the_recipe_s_own_rounding(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were those of plain rounding, of which calibration takes more from some than others."""
    plain = _by_name(work)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    calibrated = _by_name(replace(work, recipe=find_recipe("int4-gptq")))
    ratios = {name: calibrated[name] / plain[name] for name in plain}
    assert sum(calibrated.values()) < 0.9 * sum(plain.values())
    assert max(ratios.values()) > 1.2 * min(ratios.values())


@only(GEMMA2)
def test_interrupted_measuring_goes_on_and_finds_the_same(
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


def test_blocks_on_the_diagonal_hold_most_of_it(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wide matrices keep only them: the estimate stays one."""
    whole = _by_name(work)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(measuring, "_WIDEST", 16)
    cut = _by_name(work)
    assert cut == pytest.approx(whole, rel=0.5)
    assert cut != whole
