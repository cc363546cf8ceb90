"""`gemma-export search --ray` on a cluster of two nodes, which the tests start on this machine."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from gemma_export.cli import run
from gemma_export.search.job import Failure, Job
from gemma_export.search.measures import Stage
from gemma_export.search.schedule import Outcome, outcome_of
from tests.export.search.searching import BY_WEIGHTS, search, write_model, write_search

pytestmark = [pytest.mark.serial, pytest.mark.filterwarnings("ignore")]  # ray's own
_STORE = 80 << 20  # bytes of a node's object store, ray's least


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a head without cores and of two nodes with one each."""
    pytest.importorskip("ray", reason="NOT TESTED: the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, object_store_memory=_STORE)
        yield nodes.address
    finally:
        nodes.shutdown()


def test_groups_of_cells_run_on_the_nodes(
    cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And a cell that fails there fails alone."""
    write_model(tmp_path)
    models = ["model.gguf", {"checkpoint": "random:1", "config": "missing.json"}]
    content = BY_WEIGHTS | {"recipes": ["int4", "none"]}
    file = write_search(tmp_path, checkpoints=models, **content)
    found = search(file, tmp_path / "out", capfd, f"--ray={cluster}")
    states = {(cell["model"], cell["recipe"]): cell["state"] for cell in found["cells"]}
    assert {states["model.gguf", "int4"], states["model.gguf", "none"]} == {"front", "take"}
    assert states["random:1", "int4"] == "ruled out"
    for cell in found["cells"]:
        if cell["bundle"]:
            assert (tmp_path / "out" / cell["bundle"] / "manifest.json").exists()

    again = search(file, tmp_path / "out", capfd)  # on this machine
    assert all(cell["is_reused"] for cell in again["cells"] if cell["figures"])


def test_a_machine_that_does_not_see_the_folder_says_so(cluster: str, tmp_path: Path) -> None:
    from gemma_export.search.schedule import open_scheduler

    job = Job("cell", tmp_path / "elsewhere", (), token=".search.lock")
    with open_scheduler(1, cluster) as scheduler:
        assert not scheduler.is_alone
        failure = scheduler.submit([job], 1).result(120)["cell"]
    assert failure is not None
    assert f"does not see {tmp_path / 'elsewhere'}; choose an --output that" in failure.reason


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("here", "expected HOST:PORT, ray://HOST:PORT or auto"),
    ],
)
def test_without_a_cluster_one_line_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], address: str, reason: str
) -> None:
    pytest.importorskip("ray", reason="NOT TESTED: the extra `ray` is not installed")
    write_model(tmp_path)
    file = write_search(tmp_path, **BY_WEIGHTS, recipes="int4")
    assert run(["search", str(file), f"--output={tmp_path / 'out'}", f"--ray={address}"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: no Ray cluster at {address}: ")
    assert reason in last


def test_without_ray_the_extra_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    write_model(tmp_path)
    file = write_search(tmp_path, **BY_WEIGHTS, recipes="int4")
    assert run(["search", str(file), f"--output={tmp_path / 'out'}", "--ray=auto"]) == 1
    assert "pip install 'gemma-export[ray]'" in capfd.readouterr().err


def test_a_lost_worker_fails_its_cells_alone() -> None:
    future: Future[Outcome] = Future()
    future.set_exception(RuntimeError("first line\nthe node died"))
    jobs: list[Any] = [Job(name, Path(), ()) for name in "ab"]
    expected = Failure(Stage.EXPORT, "its worker was lost: the node died")
    assert outcome_of(future, jobs) == {"a": expected, "b": expected}
