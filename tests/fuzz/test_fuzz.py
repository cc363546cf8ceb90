"""Every reader takes its seeds, former findings and some hundred damaged inputs well."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_runtime.errors import BundleError
from tests.fuzz.judge import MOST_BYTES, judge, reset_peak
from tests.fuzz.mutate import mutate
from tests.fuzz.reader import CORPUS
from tests.fuzz.readers import READERS

pytestmark = pytest.mark.filterwarnings("ignore")  # what other packages say of damaged files


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_give_a_result_or_one_line(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    for package in reader.packages:
        pytest.importorskip(package)
    inputs, chance = reader.inputs(name), random.Random(name)
    read = reader.open(tmp_path)
    damaged = [mutate(chance, inputs) for _ in range(reader.tried)]
    reset_peak()
    problems = [
        (verdict.problem, data[:200])
        for data in (*inputs, *damaged)
        if (verdict := judge(read, data)).problem
    ]
    assert problems == []


@pytest.mark.parametrize("name", READERS)
def test_a_seed_is_accepted(tmp_path: Path, name: str) -> None:
    """Else the damage would never come past the first check."""
    reader = READERS[name]
    read = reader.open(tmp_path)
    assert judge(read, reader.inputs(name)[0]).accepted


def test_every_folder_of_the_corpus_is_of_a_reader() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} <= READERS.keys()


def _fail(data: bytes) -> None:
    raise {b"a": KeyError("x"), b"b": BundleError(""), b"c": BundleError("damaged")}[data]


def _fill(data: bytes) -> None:
    bytearray(b"\1") * (MOST_BYTES + (8 << 20))


def test_the_judge_finds_other_errors_and_empty_lines() -> None:
    assert "KeyError" in (judge(_fail, b"a").problem or "")
    assert "without a message" in (judge(_fail, b"b").problem or "")
    assert judge(_fail, b"c").problem is None
    assert not judge(_fail, b"c").accepted


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak")
def test_the_judge_finds_too_much_memory() -> None:
    reset_peak()
    assert "MiB, expected less" in (judge(_fill, b"").problem or "")


def test_the_same_chance_gives_the_same_damage() -> None:
    seeds = [b'{"a": [1, {"b": "c"}]}', b"\x08\0\0\0\0\0\0\0{}      ", b""]
    first, again = ([mutate(random.Random(i), seeds) for i in range(300)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 100


def test_the_command_tells_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--reader", "reply json", "--runs", "50"]
    done = subprocess.run(
        [*command, "--json", "--findings", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (tally,) = json.loads(done.stdout)
    assert (tally["reader"], tally["runs"], tally["findings"]) == ("reply json", 50, [])
