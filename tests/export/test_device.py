"""`--device`: calibration on a second device gives the host's codes, and its memory is bounded.

The second device is one that torch can have anywhere (`second_device.py`): it refuses operands of
two devices, as an accelerator does. It is added in another process, because that is for good.
"""

import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from gemma_export.cli import run
from gemma_export.computing import CPU, DeviceCeiling, choose_device, unused_note
from gemma_export.device import HOST, check_device, grain
from gemma_export.model.sizes import find_official
from gemma_export.quantize.calibrated import working_bytes
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.errors import DeviceError
from tests.export.models import SHORT_E2B, SHORT_GEMMA2, save_tiny

Call = Callable[..., Any]


def _call(name: str, args: tuple[object, ...]) -> object:
    return getattr(importlib.import_module("tests.export.on_second_device"), name)(*args)


@pytest.fixture(scope="module")
def on_second() -> Iterator[Call]:
    """Calls a function of `on_second_device` in a process that has the device."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} takes no device that is written in Python")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda name, *args: pool.submit(_call, name, args).result()


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per-layer embeddings, and layers that share caches."""
    folder = tmp_path_factory.mktemp("e2b")
    save_tiny(SHORT_E2B, folder)
    return folder


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma2")
    save_tiny(SHORT_GEMMA2, folder)
    return folder


@pytest.mark.parametrize("recipe", ["int4-asym-distilled", "int8-smooth"])
def test_a_device_gives_the_codes_of_the_host(on_second: Call, e2b: Path, recipe: str) -> None:
    """All stages: factors, order of channels, table, layers, distillation. Operands never mix."""
    (host, second), moved = on_second("calibrate", e2b, recipe)
    assert host == second
    assert moved > 100


def test_a_device_without_float64_gets_none_and_gives_the_same_codes(
    on_second: Call, gemma2: Path
) -> None:
    """The host computes GPTQ's factors for it."""
    (host, second), got_float64 = on_second("calibrate_without_float64", gemma2, "int4-gptq")
    assert host == second
    assert not got_float64


def test_a_device_spends_the_bits_of_a_budget_as_the_host(on_second: Call, e2b: Path) -> None:
    host, second = on_second("spend_bits", e2b, "int4-gptq", 6.5)
    assert host == second
    assert "bits: 8" in host


def test_a_device_measures_the_scales_of_the_host(on_second: Call, e2b: Path) -> None:
    host, second = on_second("measure", e2b, "int4")
    assert host == second


def test_reference_and_teacher_on_a_device_give_the_figures_of_the_host(
    on_second: Call, e2b: Path
) -> None:
    for host, second in on_second("refer", e2b, "int4"):
        assert second == pytest.approx(host, rel=1e-4)


@pytest.mark.parametrize("recipe", ["int4-gptq", "int4-distilled", "int8-smooth"])
def test_calibration_holds_no_more_of_the_device_than_was_estimated(
    on_second: Call, gemma2: Path, recipe: str
) -> None:
    peak, estimate = on_second("held", gemma2, recipe)
    assert peak <= estimate


def test_an_export_tells_the_peak_of_the_device(
    on_second: Call, gemma2: Path, tmp_path: Path
) -> None:
    summary = on_second("export", gemma2, tmp_path / "out")
    assert summary.device == "second:0"
    assert 1000 < summary.peak_device_bytes < 100 << 20


def test_an_estimate_over_the_limit_or_over_what_is_free_is_refused(on_second: Call) -> None:
    over, full, fits = on_second("refusals", 6 << 30)
    assert over.startswith("MemoryLimit: this export needs about 6.00 GiB of second:0, --max-vram")
    assert "where 6.00 GiB are free" in full
    assert "--device cpu" in full
    assert not fits


def test_a_peak_over_the_limit_and_a_full_device_are_one_line(on_second: Call) -> None:
    over, full, fits = on_second("overflow")
    assert over.startswith("MemoryLimit: memory of second:0 reached ")
    assert full.startswith("MemoryLimit: second:0 is out of memory")
    assert "\n" not in full
    assert not fits


def test_auto_takes_no_device_that_was_not_measured() -> None:
    assert choose_device("auto") == choose_device("cpu") == CPU
    assert DeviceCeiling(CPU).peak_bytes() is None


def test_a_user_is_told_of_an_accelerator_that_auto_leaves_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not unused_note(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (note,) = unused_note(CPU)
    assert "--device cuda" in note


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "CUDA", "meta", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError, match=r"expected .*auto.*, or cuda:N"):
        check_device(name)


@pytest.mark.parametrize("name", ["cuda", "mps", "cuda:7"])
def test_a_device_that_torch_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    count = 2 if name == "cuda:7" else 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    found = "it has 2" if count else "it has none"
    with pytest.raises(DeviceError, match=f"finds no such device here: {found}; choose from cpu"):
        choose_device(name)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--device", "tpu"], "--device is 'tpu'; expected cpu"),
        (["--max-vram", "8GiB"], "--device is auto, which is the host"),
        (["--device", "cuda", "--max-vram", "lots"], "'lots' is not an amount of memory"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(
    gemma2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], match: str
) -> None:
    output = tmp_path / "out"
    assert run(["--checkpoint", str(gemma2), "--output", str(output), *flags]) == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_plan_tells_the_memory_of_a_device_that_is_not_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--size", "2b", "--quant", "int4-gptq", "--plan"]
    assert run([*flags, "--device", "cuda:1", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["device"] == "cuda:1"
    config, recipe = find_official("2b").config, find_recipe("int4-gptq")
    assert plan["device_peak_bytes"] >= working_bytes(config, recipe, None, "cuda") > 1 << 30
    on_device = plan["export_peak_bytes"]
    assert run([*flags, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["device_peak_bytes"] is None
    assert plan["device"] == HOST
    assert plan["export_peak_bytes"] > 2 * on_device
    assert run([*flags, "--device", "cuda"]) == 0
    assert " of cuda" in " ".join(capsys.readouterr().out.split())


def test_an_accelerator_starts_larger_pieces_one_after_another() -> None:
    host, other = grain(HOST), grain("cuda")
    assert other.workers == 1 <= host.workers
    assert other.weights > host.weights
