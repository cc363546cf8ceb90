"""What can't compute Gemma 4 says so in one line, before anything is written."""

import json
from pathlib import Path

import pytest

from gemma_export.cli import run
from gemma_export.targets import TARGETS, all_targets
from tests.export.models import E2B, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2b")
    save_tiny(E2B, folder)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run(list(flags)) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_a_target_that_is_not_built_for_them_refuses(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of ours are; a third party's may not be."""
    assert [one.name for one in all_targets() if not one.takes_irregular] == []
    monkeypatch.setitem(TARGETS, "fake", "tests.export.fake_target")
    flags = ["--checkpoint", str(folder), "--target", "fake", "--quant", "int4", "--prefill", "8"]
    takers = " or ".join(one.name for one in all_targets() if one.takes_irregular)
    for more in (["--plan"], ["--output", str(tmp_path / "out")]):
        line = refusal(capsys, *flags, *more)
        assert "fake can't compute this model's per-layer embeddings, shared caches" in line
        assert f"choose --target {takers}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("delegate", ["vulkan", "coreml"])
def test_a_delegate_that_lowers_a_traced_graph_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], delegate: str
) -> None:
    flags = ["--checkpoint", str(folder), "--target", "executorch", "--delegate", delegate]
    for quant in ("none", "int4"):
        line = refusal(capsys, *flags, "--prefill", "1", "--quant", quant, "--plan")
        assert f"--delegate {delegate} can't compute this model's per-layer embeddings" in line
        assert "leave --delegate out" in line


def test_targets_with_different_kernels_for_8_bits_are_exported_one_at_a_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gates of per-layer embeddings have groups in ONNX, and none in XNNPACK."""
    flags = ["--checkpoint", str(folder), "--quant", "int4", "--prefill", "8", "--plan"]
    line = refusal(capsys, *flags, "--target", "onnx,executorch")
    assert "xnnpack has no kernel for model.per_layer_model_projection.weight as int8-g32" in line
    assert "for executorch alone" in line
    for target in ("onnx", "executorch"):
        assert run([*flags, "--target", target]) == 0


def test_a_mixture_of_experts_is_refused_by_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--size", "26b-a4b", "--plan")
    assert "size 26b-a4b of Gemma 4 can't be exported: it is a mixture of experts" in line


def test_without_quant_it_gets_the_recipe_of_other_models_of_its_size(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model has no tokenizer, so there is no text to smooth it by."""
    for model, recipe in ((["--checkpoint", str(folder)], "int8"), (["--size", "e2b"], "mixed")):
        assert run([*model, "--plan", "--json"]) == 0
        (planned,) = json.loads(capsys.readouterr().out)
        assert planned["recipe"] == recipe
