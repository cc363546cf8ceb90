"""Ranks of torchrun share the calibration text, give the codes of one, and end together.

Every start of torchrun imports torch once per rank, so each does as much as it can.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma_export import shards
from gemma_export.cli import run
from gemma_export.computing import choose_device
from gemma_export.shards import Share, Sums
from gemma_runtime.errors import DeviceError, RankError
from gemma_runtime.manifest import Manifest
from tests.export import on_ranks
from tests.export.conftest import export_folder
from tests.export.models import SHORT_E2B, SHORT_GEMMA3, save_tiny, untied

_ROOT = Path(__file__).parents[2]


def _torchrun(ranks: int, cache: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=_ROOT,
        env={**os.environ, "GEMMA_EXPORT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def _errors(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The lines that the exporter wrote; torchrun adds a report of its own."""
    assert done.returncode == 1, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_three_ranks_give_the_codes_of_one_and_refuse_what_reads_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With smoothing, `--bits`, distillation, per-layer embeddings, and shared caches."""
    folders = []
    for tiny in (SHORT_E2B, untied(SHORT_GEMMA3)):
        save_tiny(tiny, tmp_path / tiny.name)
        folders.append(str(tmp_path / tiny.name))
    output = tmp_path / "found.json"
    here = ("-m", "tests.export.on_ranks", "write_computed", ",".join(folders), str(output))
    done = _torchrun(3, tmp_path / "three", *here)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    expected = "rounding by int8, which reads no calibration text, is not shared among ranks"
    assert found.pop("refusal").startswith(expected)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "one"))
    assert found == on_ranks.compute(",".join(folders))
    assert not list((tmp_path / "three").rglob("*-rank-*"))


def test_an_export_whose_rank_was_killed_ends_with_one_line_and_goes_on_in_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(SHORT_GEMMA3, tmp_path / "model")
    output, cache = tmp_path / "bundle", tmp_path / "two"
    flags = ["--checkpoint", str(tmp_path / "model"), "--quant", "int4-gptq", "--context", "128"]
    flags += ["--prefill", "24", "--output", str(output), "--json"]
    killed = _torchrun(2, cache, "-m", "tests.export.on_ranks", "export", "kill", *flags)
    (line,) = _errors(killed)
    assert line.startswith("error: a rank was lost; torchrun tells which")
    assert not killed.stdout
    assert "SIGTERM)" not in killed.stderr  # the first rank has ended by itself
    assert not list(tmp_path.glob("*bundle*"))
    assert not list(cache.rglob("*partial*"))
    first, second = (next(cache.rglob(f"rounded-0{i}.safetensors")) for i in (0, 1))
    inodes = first.stat().st_ino, second.stat().st_ino
    kept = tmp_path / "kept"
    kept.hardlink_to(first)  # so that no new file has its inode

    script = Path(sys.executable).with_name("gemma-export")
    done = _torchrun(2, cache, "--no-python", str(script), *flags)
    assert done.returncode == 0, done.stderr
    assert [one["bundle"] for one in json.loads(done.stdout)] == [str(output)]
    assert (first.stat().st_ino, second.stat().st_ino) == inodes
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "one"))
    alone = export_folder(tmp_path / "model", "int4-gptq", tmp_path / "alone")
    manifest = Manifest.from_json((output / "manifest.json").read_bytes())
    assert manifest.quantization == alone.manifest.quantization


def test_an_error_of_any_rank_ends_all_and_the_first_tells_it(tmp_path: Path) -> None:
    save_tiny(SHORT_GEMMA3, tmp_path / "model")
    flags = ("--checkpoint", str(tmp_path / "model"), "--quant", "int4-gptq", "--output", "bundle")
    full = _torchrun(2, tmp_path / "cache", "-m", "tests.export.on_ranks", "export", "full", *flags)
    assert _errors(full) == ["error: rank 1: [Errno 28] No space left on device: 'residual'"]


@pytest.fixture
def first_of_nine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that torchrun gives to the first of nine ranks on one machine."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "9")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")


@pytest.mark.usefixtures("first_of_nine")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["--size", "2b", "--plan"], "--plan"), (["cache", "list"], "gemma-export cache")],
)
def test_what_reads_no_text_is_refused_in_ranks(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    expected = f"error: {what} is not shared among ranks, found 9; run it without torchrun\n"
    assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("first_of_nine")
def test_more_ranks_than_pieces_and_one_device_for_several_are_refused() -> None:
    with pytest.raises(RankError, match="start at most 8 ranks"), shards.joined("cpu"):
        pass
    with pytest.raises(DeviceError, match="one device for 9 ranks; --device cuda gives each"):
        choose_device("cuda:1")


def test_pieces_have_two_sequences_so_that_their_halves_differ() -> None:
    """`--bits` rounds for one half and is judged on the other."""
    shortest = {n: min(len(one.sequences) for one in Share(n).pieces) for n in range(1, 40)}
    assert shortest.pop(1) == 1
    assert min(shortest.values()) == 2


@pytest.mark.parametrize("sequences", [1, 5, 11, 19, 384])
def test_sums_have_one_order_for_any_number_of_ranks(
    sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree of each number of ranks is put together as `total` does, without sending."""
    values = torch.randn(sequences, 64, generator=torch.Generator().manual_seed(0)) * 1e3
    totals = []
    for ranks in range(1, Share(sequences).count_pieces + 1):
        monkeypatch.setattr(shards, "ranks", lambda ranks=ranks: ranks)
        joined: list[shards._Sum] = []
        seen: list[int] = []
        for rank in range(ranks):
            monkeypatch.setattr(shards, "rank", lambda rank=rank: rank)
            share, sums = Share(sequences), Sums()
            for piece in share.pieces:
                own = [share.own[i] for i in piece.sequences]
                seen += own
                sums.of(piece)["x"] = values[own].sum(0)
            sums._close()
            for one in sums._sums:
                shards._push(joined, one)
        assert seen == list(range(sequences))
        totals.append(shards._joined(joined).values["x"])
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert torch.allclose(totals[0], values.sum(0), atol=1e-2)
