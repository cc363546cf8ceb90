"""Compares plans with the measured sizes and memory of exports and sessions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

from gemma_export.checkpoint.folder import open_folder
from gemma_export.cli import run
from gemma_export.model.config import GemmaConfig
from gemma_export.model.sizes import OFFICIAL, Official, find_official
from gemma_export.plan import Plan, make_plan
from gemma_export.plan_table import render_plan
from gemma_export.quantize.recipe import RECIPES, find_recipe
from gemma_export.targets import Geometry, load_target
from gemma_export.targets.onnx.target import DATA
from gemma_runtime.errors import TargetError
from tests.export.conftest import Export, TinyCheckpoint, only
from tests.export.models import GEMMA2, GEMMA4S, save_tiny, untied

MIB = 1 << 20


def plan(
    config: GemmaConfig,
    quant: str = "int4",
    context: int = 4096,
    full_cache: bool = False,
    target: str = "onnx",
    prefill: int = 512,
    cache: str | None = None,
) -> Plan:
    geometry = Geometry(context, min(prefill, context), full_cache)
    caches = load_target(target).caches(config, geometry)
    formats = find_recipe(quant).formats(config)
    return make_plan(config, quant, formats, caches, geometry, target, cache)


@pytest.mark.parametrize("quant", ["int4", "int4-asym", "mixed", "int8", "none"])
def test_the_planned_size_is_that_of_the_exported_file(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    """They differ by less than a page: the plan rounds the last tensor up to a whole page."""
    data = export(tiny.folder, quant, context=48).directory / DATA
    planned = plan(tiny.open().config, quant, context=48).artifact.total
    assert 0 <= planned - data.stat().st_size < 4096


@only(*GEMMA4S)
@pytest.mark.parametrize("quant", ["int4-asym", "int8", "none"])
def test_the_planned_size_of_two_files_is_that_of_both(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    """They differ by less than a page for each file."""
    folder = export(tiny.folder, quant, context=48).directory
    files = [path.stat().st_size for path in folder.glob("*.data")]
    planned = plan(tiny.open().config, quant, context=48).artifact
    assert 0 <= planned.total - sum(files) < 4096 * len(files)
    assert len(files) == 2 if planned.per_layer else 1


def test_the_plan_of_gemma4_tells_the_per_layer_table_and_the_caches_of_their_owners() -> None:
    """E2B: a table of 35 parts of 256; caches of 12 local and 3 global layers, of 35."""
    planned = plan(find_official("e2b").config, "int4", context=4096)
    assert planned.parameters.per_layer == 262144 * 35 * 256
    assert planned.artifact.per_layer == planned.parameters.per_layer * 9 // 16
    assert planned.caches.local == 12 * 2 * (512 + 64) * 256 * 4
    assert planned.caches.full == 3 * 2 * 4096 * 512 * 4
    assert planned.run.total < planned.artifact.total + planned.caches.total
    text = StringIO()
    Console(file=text, width=200).print(render_plan(planned))
    assert "per-layer table 1.23 GiB (stays on storage)" in text.getvalue()


def test_a_folder_for_transformers_has_its_per_layer_table_in_memory() -> None:
    planned = plan(find_official("e2b").config, "int4", target="hf")
    assert planned.artifact.per_layer == planned.parameters.per_layer * 2  # float16
    assert planned.run.mapped > planned.artifact.per_layer
    text = StringIO()
    Console(file=text, width=200).print(render_plan(planned))
    assert "per-layer table 4.38 GiB, " in text.getvalue()


def test_a_head_of_its_own_is_counted(export: Export, tmp_path: Path) -> None:
    save_tiny(untied(GEMMA2), tmp_path)
    config = open_folder(tmp_path).config
    planned, tied = plan(config, context=48), plan(replace(config, tied=True), context=48)
    data = export(tmp_path, "int4", context=48).directory / DATA
    assert 0 <= planned.artifact.total - data.stat().st_size < 4096
    assert planned.parameters.head == planned.parameters.table == 96 * 128
    assert tied.parameters.head == tied.artifact.head == 0
    assert planned.run.total > tied.run.total
    text = StringIO()
    Console(file=text, width=200).print(render_plan(planned))
    assert "head 0, " in text.getvalue()  # million weights


@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int8-channel", "none"])
def test_the_planned_size_is_that_of_core_ml_s_weight_file(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    """The file also has 64 bytes of metadata per tensor, and gains scaled by the headroom."""
    pytest.importorskip("coremltools")
    folder = export(tiny.folder, quant, context=48, target="coreml", prefill=8).directory
    size = next(folder.rglob("weight.bin")).stat().st_size
    planned = plan(tiny.open().config, quant, context=48, target="coreml", prefill=8)
    assert planned.artifact.total <= size <= 1.1 * planned.artifact.total
    assert planned.artifact.ropes == 0


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda o: f"{o.family}-{o.size}")
@pytest.mark.parametrize("quant", RECIPES)
def test_the_parts_add_up_to_the_totals(official: Official, quant: str) -> None:
    planned = plan(official.config, quant)
    for group in (planned.parameters, planned.artifact):
        parts = msgspec.to_builtins(group)
        assert parts.pop("total") == sum(parts.values())
    assert planned.parameters.total == official.config.parameters
    assert planned.caches.total == planned.caches.local + planned.caches.full


def test_the_bytes_of_each_part_match_a_calculation_by_hand() -> None:
    """Gemma 2 2b in int4: half a byte per weight, and a float16 scale per 32 weights."""
    config = find_official("2b").config
    table = 256000 * 2304
    attention = 26 * (2304 * (2048 + 1024 + 1024) + 2048 * 2304)
    mlp = 26 * 3 * 2304 * 9216
    planned = plan(config, "int4", context=1024)
    assert planned.parameters.table == table
    assert planned.parameters.attention == attention
    assert planned.parameters.mlp == mlp
    assert planned.parameters.norms == (26 * 4 + 1) * 2304
    assert planned.artifact.table == table * 9 // 16
    assert planned.artifact.attention == attention * 9 // 16
    assert planned.artifact.mlp == mlp * 9 // 16
    assert planned.artifact.norms == planned.parameters.norms * 4
    assert planned.artifact.ropes == 2 * 1024 * 128 * 4  # both kinds of layer use the same rope
    assert planned.bits_per_weight == 4.5


def test_the_plan_counts_zero_points_and_int8_codes() -> None:
    config = find_official("1b").config
    parts = {quant: plan(config, quant).artifact for quant in RECIPES}
    assert parts["int4-asym"].table - parts["int4"].table == 262144 * 1152 // 64
    assert parts["mixed"].table == 262144 * 1152 * 65 // 64
    assert parts["int8"].table == 262144 * 1152 * 17 // 16
    assert parts["mixed"].mlp == parts["int4-asym"].mlp
    assert parts["none"].mlp == 26 * 3 * 1152 * 6912 * 4


@pytest.mark.parametrize(
    ("size", "context", "full_mib", "ring_mib"),
    [
        ("2b", 2048, 416, 416),
        ("2b", 4096, 832, 832),
        ("2b", 8192, 1664, 1248 + 13 * 64 / 128),
        ("1b", 4096, 208, 54 + 22 * 64 / 512),
        ("4b", 8192, 2176, 552 + 29 * 64 / 128),
    ],
)
def test_cache_bytes_match_a_calculation_by_hand(
    size: str, context: int, full_mib: int, ring_mib: float
) -> None:
    """Float32 caches of the whole context, or of the window and 64 more rows in local layers."""
    config = find_official(size).config
    assert plan(config, context=context, full_cache=True).caches.total == full_mib * MIB
    caches = plan(config, context=context).caches
    assert caches.total / MIB == pytest.approx(ring_mib, rel=0.01)
    assert caches.saved == full_mib * MIB - caches.total


def test_int8_caches_take_a_quarter_of_the_memory() -> None:
    """Gemma 2 2b at 4096 tokens: 832 MiB become 208, and a phone's verdict changes."""
    config = find_official("2b").config
    planned, int8 = plan(config), plan(config, cache="int8")
    assert (planned.caches.dtype, int8.caches.dtype) == ("float32", "int8")
    assert (planned.caches.total, int8.caches.total) == (832 * MIB, 208 * MIB)
    assert int8.caches.local * 4 == planned.caches.local
    assert int8.run.caches == int8.caches.total
    assert planned.artifact == int8.artifact
    verdicts = [{phone.ram_gb: phone.verdict for phone in p.phones} for p in (planned, int8)]
    assert verdicts[0] != verdicts[1]


def test_a_plan_refuses_a_cache_type_that_the_target_lacks() -> None:
    with pytest.raises(TargetError, match="--cache int8 is not for coreml: Core ML's states"):
        plan(find_official("2b").config, target="coreml", cache="int8")


@pytest.mark.parametrize("context", [512, 2048, 4096])
def test_a_ring_saves_nothing_when_the_window_holds_the_context(context: int) -> None:
    caches = plan(find_official("2b").config, context=context).caches
    assert caches.saved == 0
    assert caches.note == "ring saves 0 MiB at this context"


def test_a_ring_saves_the_rows_beyond_window_and_slack() -> None:
    caches = plan(find_official("2b").config, context=8192).caches
    assert caches.saved == 13 * (8192 - 4096 - 64) * 4 * 256 * 2 * 4
    assert caches.note == f"ring saves {round(caches.saved / MIB)} MiB at this context"


def test_a_full_cache_saves_nothing() -> None:
    caches = plan(find_official("1b").config, full_cache=True).caches
    assert (caches.saved, caches.note) == (0, "ring saves 0 MiB at this context")


# Resident memory in MiB: after loading, at the peak of loading, and after 4096 tokens in chunks of
# 512. Measured with onnxruntime 1.32 and 2 threads, on models cut to the given number of layers.
SESSIONS = [
    ("gemma3", "270m", 18, "int4", 316, 394, 428),
    ("gemma3", "270m", 18, "int8", 444, 602, 558),
    ("gemma3", "270m", 18, "none", 1732, 1732, 1865),
    ("gemma2", "2b", 2, "int4", 695, 1046, 1099),
    ("gemma2", "9b", 1, "int4", 1011, 1558, 1495),
    ("gemma2", "27b", 1, "int4", 1545, 2248, 2514),
]


@pytest.mark.parametrize("measured", SESSIONS, ids=lambda m: f"{m[1]}-{m[3]}")
def test_planned_running_memory_is_close_to_the_measured_one(
    measured: tuple[str, str, int, str, int, int, int],
) -> None:
    family, size, layers, quant, _, loading, full = measured
    config = find_official(size, family).config
    run = plan(replace(config, kinds=config.kinds[:layers]), quant).run
    assert run.loading / MIB == pytest.approx(loading, rel=0.12)
    assert run.total / MIB == pytest.approx(max(loading, full), rel=0.12)


@pytest.mark.parametrize(
    ("size", "context", "prefill", "running"), [("270m", 2048, 128, 294), ("2b", 4096, 512, 2705)]
)
def test_executorch_needs_no_more_memory_than_planned_and_not_much_less(
    size: str, context: int, prefill: int, running: int
) -> None:
    """`running` is the measured peak of the native runner with a short prompt, in MiB."""
    config = find_official(size).config
    planned = plan(config, context=context, target="executorch", prefill=prefill)
    assert running <= planned.run.total / MIB <= 1.35 * running


def test_an_executorch_export_needs_no_more_memory_than_planned() -> None:
    """645 MiB is the measured peak for the 270M, 555 that of writing E2B: no table is in memory."""
    small = plan(find_official("270m").config, context=2048, target="executorch", prefill=128)
    assert 645 <= small.export_peak_bytes / MIB <= 1.35 * 645
    large = plan(find_official("e2b").config, target="executorch")
    assert large.export_peak_bytes / MIB >= 555
    assert large.artifact.total / MIB == pytest.approx(2514, rel=0.002)


@pytest.mark.parametrize(("size", "exporting"), [("270m", 766), ("2b", 654)])
def test_a_core_ml_export_needs_no_more_memory_than_planned(size: str, exporting: int) -> None:
    """`exporting` is the measured peak of resident memory, in MiB."""
    planned = plan(find_official(size).config, target="coreml").export_peak_bytes / MIB
    assert exporting <= planned <= 1.35 * exporting


def test_a_core_ai_export_needs_no_more_memory_than_planned() -> None:
    """2141 MiB is the measured peak of resident memory for the 270M."""
    planned = plan(find_official("270m").config, target="coreai").export_peak_bytes / MIB
    assert 2141 <= planned <= 1.35 * 2141


@pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="the plan is for torch's CPU build; a CUDA build is installed",
)
@pytest.mark.serial
def test_a_real_export_needs_no_more_memory_than_planned(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma2",
        "num_hidden_layers": 2,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "vocab_size": 128000,
        "sliding_window": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--checkpoint", "random", "--config", str(tmp_path / "config.json"), "--json"]
    (planned,) = gemma_export(tmp_path, *flags, "--plan")
    (done,) = gemma_export(tmp_path, *flags, "--output", str(tmp_path / "bundle"))
    # The plan counts a tokenizer, but random weights have none.
    tokenizer = 128000 * 1700
    assert done["peak_rss_bytes"] <= planned["export_peak_bytes"]
    assert done["peak_rss_bytes"] >= 0.6 * (planned["export_peak_bytes"] - tokenizer)


def test_the_export_peak_counts_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    def peak(*flags: str) -> int:
        assert run(["--size", "270m", "--plan", "--json", *flags]) == 0
        (planned,) = json.loads(capsys.readouterr().out)
        assert planned["counts_calibration"]
        return int(planned["export_peak_bytes"])

    plain = peak("--quant", "int8")
    assert peak("--quant", "int8-smooth") > 945 * MIB > plain  # 945 MiB were measured
    assert peak("--quant", "int8", "--cache", "int8") > plain
    assert peak("--quant", "int4", "--bits", "7") > peak("--quant", "int4")


def test_the_plan_tells_how_long_calibration_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def calibration(*flags: str) -> dict[str, Any] | None:
        assert run(["--size", "270m", "--plan", "--json", *flags]) == 0
        (planned,) = json.loads(capsys.readouterr().out)
        found: dict[str, Any] | None = planned["calibration"]
        return found

    def work(found: dict[str, Any] | None) -> dict[str, int]:
        assert found is not None
        return {stage["name"]: stage["multiply_adds"] for stage in found["stages"]}

    assert calibration("--quant", "int8") is None
    whole = calibration("--quant", "int4-gptq", "--bits", "7.5", "--cache", "int8")
    assert list(work(whole)) == ["measure", "channels", "table", "calibrate", "caches"]
    assert whole is not None
    assert whole["seconds"] == pytest.approx(sum(stage["seconds"] for stage in whole["stages"]))
    assert whole["tokens"] == pytest.approx(202_752, rel=0.02)  # counted with its tokenizer
    text = tmp_path / "text.txt"
    text.write_text("Ein Satz, noch einer. " * 2000, "utf-8")
    short = calibration("--quant", "int4-gptq", "--calibration", str(text))
    assert work(short)["table"] == work(whole)["table"]
    assert work(short)["channels"] < work(whole)["channels"] / 1.5


def test_a_plan_for_a_device_of_another_machine_tells_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--size", "270m", "--plan", "--quant", "int4-gptq", "--device", "cuda:99"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "10¹² multiply-adds for 203,264 tokens of text; this machine has no such device" in shown


def test_a_plan_without_torch_says_what_it_cannot_count() -> None:
    code = "import sys; sys.modules['torch'] = None; from gemma_export.cli import run"
    code += "; sys.exit(run(['--size', '270m', '--plan']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "besides calibration: estimating it needs torch" in " ".join(done.stdout.split())


def gemma_export(cache: Path, *flags: str) -> list[dict[str, int]]:
    code = "import sys; from gemma_export.cli import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *flags]
    environment = {**os.environ, "GEMMA_EXPORT_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    content: list[dict[str, int]] = json.loads(done.stdout)
    return content


def test_the_export_peak_does_not_grow_with_the_number_of_layers() -> None:
    config = find_official("27b").config
    one = replace(config, kinds=config.kinds[:1])
    assert plan(config).export_peak_bytes == plan(one).export_peak_bytes


def test_phones_with_more_memory_get_no_worse_verdict() -> None:
    order = ("does not fit", "tight", "fits")
    for official in OFFICIAL:
        verdicts = [order.index(phone.verdict) for phone in plan(official.config).phones]
        assert verdicts == sorted(verdicts)


def test_a_model_does_not_fit_if_it_needs_more_than_the_budget() -> None:
    planned = {(o.family, o.size): {p.ram_gb: p for p in plan(o.config).phones} for o in OFFICIAL}
    assert planned["gemma3", "270m"][4].verdict == "fits"
    assert planned["gemma2", "2b"][6].verdict == "does not fit"
    assert planned["gemma2", "2b"][12].verdict == "fits"
    assert {p.verdict for p in planned["gemma2", "9b"].values()} == {"does not fit"}
    for phones in planned.values():
        for phone in phones.values():
            assert (phone.verdict == "does not fit") == (phone.needed > phone.budget)


def test_a_plan_survives_a_round_trip_through_json() -> None:
    planned = plan(find_official("1b").config)
    assert msgspec.json.decode(msgspec.json.encode(planned), type=Plan) == planned


def test_the_rendered_plan_shows_caches_phones_and_every_section() -> None:
    console = Console(width=200, record=True, file=StringIO())
    planned = plan(find_official("1b").config)
    console.print(render_plan(planned))
    text = console.export_text()
    assert planned.caches.note in text
    for phone in planned.phones:
        assert f"{phone.ram_gb} GB" in text
    for word in ("parameters", "weights", "bits per weight", "running", "exporting"):
        assert word in text


def test_all_means_the_targets_that_run_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Not the folder for servers, nor the beta."""
    assert run(["--size", "1b", "--plan", "--target", "all", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [one["target"] for one in plans] == ["onnx", "executorch", "coreml", "gguf"]
