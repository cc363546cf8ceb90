"""The cache: locks between processes, damaged files, and the `cache` command."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_export.cache_command import find_entries
from gemma_export.cache_lock import InUse, exclusive, removable
from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.folder import open_folder
from gemma_export.cli import run
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_runtime.cache import cache_folder
from tests.export.conftest import export_folder
from tests.export.models import GEMMA2, save_tiny

_HOLD = """
import sys
from pathlib import Path
from gemma_export.cache_lock import exclusive

with exclusive(Path(sys.argv[1]), "at work", print):
    print("in", flush=True)
    sys.stdin.read()
"""

_CALIBRATE = """
import sys
from pathlib import Path

import torch

from gemma_export.checkpoint.folder import open_folder
from gemma_export.progress import QuietReporter
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store

torch.set_num_threads(1)
checkpoint, recipe = open_folder(Path(sys.argv[1])), find_recipe(sys.argv[2])
work = Workspace(checkpoint, recipe, Calibration("test", torch.arange(8 * 24).view(8, 24) % 96))
rounded = CalibratedWeights(work, QuietReporter().stage)
store = open_or_build_store(checkpoint, recipe, None, rounded)
print(store.file.metadata["content_digest"])
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(GEMMA2, folder)
    return open_folder(folder)


@pytest.fixture
def store(checkpoint: Checkpoint, cache: Path) -> QuantizedStore:
    return open_or_build_store(checkpoint, find_recipe("int4"))


def _failing(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Run the command line, which must exit with 1; returns its only error line."""
    assert run(list(flags)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_second_process_reports_that_it_waits_for_the_first(tmp_path: Path) -> None:
    notes: list[str] = []
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "thing")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"

    def note(text: str) -> None:
        notes.append(text)
        holder.communicate()  # closes its stdin, so it exits

    with removable(tmp_path / "thing") as free:
        assert not free
    with exclusive(tmp_path / "thing", "rounding tiny", note):
        assert holder.returncode == 0
    assert notes == ["another gemma-export is rounding tiny; waiting for it to finish"]


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "thing")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"in\n"
    holder.kill()
    holder.communicate()
    with exclusive(tmp_path / "thing", "at work", pytest.fail):
        pass


def test_two_processes_can_calibrate_the_same_model_at_the_same_time(tmp_path: Path) -> None:
    """They share a folder. The first to finish deleted files that the other still read."""
    save_tiny(GEMMA2, tmp_path / "model")

    def start(quant: str, cache: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", _CALIBRATE, str(tmp_path / "model"), quant],
            env={**os.environ, "GEMMA_EXPORT_CACHE": str(tmp_path / cache)},
            stdout=subprocess.PIPE,
            text=True,
        )

    quants = ("int4-distilled", "int4-gptq")
    together = [start(quant, "shared") for quant in quants]
    apart = [start(quant, quant) for quant in quants]
    digests, expected = ([p.communicate()[0] for p in group] for group in (together, apart))
    assert digests == expected
    assert [process.returncode for process in (*together, *apart)] == [0] * 4


@pytest.mark.parametrize("place", ["length", "header", "codes", "gain"])
def test_a_damaged_store_is_rebuilt(
    checkpoint: Checkpoint, store: QuantizedStore, place: str
) -> None:
    before, digest = store.path.read_bytes(), store.codes_digest
    info = store.file.tensors
    at = {
        "length": 2,
        "header": before.index(digest.encode()),
        "codes": info["model.layers.0.mlp.up_proj.weight.codes"].offset + 7,
        "gain": info["model.norm.weight"].offset,
    }[place]
    store.path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    notes: list[str] = []
    again = open_or_build_store(checkpoint, find_recipe("int4"), None, None, notes.append)
    assert notes == [f"the cached store {store.path} is damaged; building it again"]
    assert again.path.read_bytes() == before


def test_a_store_in_use_is_not_removed(
    store: QuantizedStore, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = store.path.stem
    line = _failing(capsys, "cache", "remove", key[:8])
    assert line.startswith(f"error: {key[:12]} not removed: in use by a running gemma-export")
    assert store.path.exists()


def test_entries_are_listed_with_their_model_and_recipe_and_can_be_removed(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(GEMMA2, tmp_path / "model")
    export_folder(tmp_path / "model", "int4-gptq", tmp_path / "out", 64)
    capsys.readouterr()
    assert run(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["kind"] for entry in entries} == {"store", "calibration"}
    for entry in entries:
        assert entry["model"].endswith("model")
        assert entry["recipe"] == "int4-gptq"
        assert entry["bytes"] > 10_000
        assert 0 <= entry["age_seconds"] < 3600
    assert run(["cache", "list"]) == 0
    assert "2 entries" in capsys.readouterr().out
    assert run(["cache", "remove", entries[0]["key"]]) == 0
    assert [entry.key for entry in find_entries(cache)] == [entries[1]["key"]]
    assert run(["cache", "remove", "--all"]) == 0
    assert find_entries(cache) == []
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_prune_removes_entries_that_were_not_used_for_the_given_time(
    checkpoint: Checkpoint, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (open_or_build_store(checkpoint, find_recipe(n)).path for n in ("int4", "int8"))
    week_ago = time.time() - 7 * 86400
    os.utime(old, (week_ago, week_ago))
    assert run(["cache", "prune", "--older-than", "8d"]) == 0
    assert old.exists()
    assert run(["cache", "prune", "--older-than", "6d"]) == 0
    assert not old.exists()
    assert new.exists()
    assert run(["cache", "prune", "--older-than", "soon"]) == 2


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["remove", "abc"], "0 cache entries start with 'abc', expected one"),
        (["remove", ""], "2 cache entries start with '', expected one"),
    ],
)
def test_a_key_that_does_not_match_exactly_one_entry_is_refused(
    cache: Path, capsys: pytest.CaptureFixture[str], flags: list[str], match: str
) -> None:
    for name in ("first", "second"):
        (cache / "native" / name).mkdir(parents=True)
    assert match in _failing(capsys, "cache", *flags)


def test_the_cache_command_does_not_import_torch(cache: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from gemma_export.cli import run"
    code += "; sys.exit(run(['cache', 'list']))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_an_unwritable_cache_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(place))
        line = _failing(capsys, "--checkpoint", "nowhere")
        assert line.startswith(f"error: can't write to the cache folder {place}: ")
        assert "set GEMMA_EXPORT_CACHE" in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="checks the paths used on Linux")
def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("GEMMA_EXPORT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/gemma-export")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/gemma-export")
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_an_entry_can_be_removed_only_after_its_last_use_ends(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    uses = [InUse(path), InUse(path)]
    while uses:
        with removable(path) as free:
            assert not free
        uses.pop()
    with removable(path) as free:
        assert free
