"""Programs that a model could write."""

import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from gemma_runtime.errors import EvaluationError
from gemma_runtime.lm_eval.code_metric import CodeMetric, pass_at_k

pytestmark = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="programs can be isolated on Linux and macOS"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="isolation by the kernel needs Linux")


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("assert 1 + 1 == 2", True),
        ("import collections, hashlib, math, re, typing", True),
        ("open('own', 'w').write('x')", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("print('passed'); raise ValueError", False),
        ("bytearray(3 << 30)", False),
        ("open('own', 'wb').write(bytes(2 << 20))", False),
        ("x = '\ud800'", True),  # a half character becomes a question mark
    ],
)
def test_a_program_passes_if_it_runs_to_its_end(program: str, passes: bool) -> None:
    assert CodeMetric(True).passes(program) is passes


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_that_does_not_end_is_killed(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_runtime.lm_eval.code_metric._CPU_SECONDS", 1)
    monkeypatch.setattr("gemma_runtime.lm_eval.code_metric._WALL_SECONDS", 4)

    assert not CodeMetric(True).passes(program)


@linux
def test_a_program_changes_no_file_of_the_user(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    metric = CodeMetric(True)

    for program in (
        f"open({str(kept)!r}, 'w').write('changed')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
    ):
        assert not metric.passes(program)

    if metric.isolation is not None and "landlock" not in metric.isolation:
        pytest.skip("this kernel has no Landlock")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


@linux
def test_a_program_reaches_no_server() -> None:
    metric = CodeMetric(True)
    metric.passes("")
    if metric.isolation == "limits":
        pytest.skip("this kernel allows neither namespaces nor Landlock")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        threading.Thread(target=_accept, args=(server,), daemon=True).start()
        address = server.getsockname()
        connect = f"import socket; socket.create_connection({address!r}, 2).close()"

        exec(connect)
        assert not metric.passes(connect)


@linux
def test_a_program_cannot_end_another_process() -> None:
    metric = CodeMetric(True)

    assert not metric.passes(f"import os; os.kill({os.getpid()}, 0)")
    assert metric.isolation is not None
    assert metric.isolation.endswith("limits")


def test_a_program_sees_neither_variables_nor_packages_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))

    assert CodeMetric(True).passes("import os; assert 'SECRET' not in os.environ")
    assert not CodeMetric(True).passes("import tests")


def test_nothing_runs_without_permission(tmp_path: Path) -> None:
    metric = CodeMetric(False)

    with pytest.raises(EvaluationError, match="allow it with --run-unsafe-code"):
        metric.compute(["assert f(1)"], [["def f(x): return x"]], [1])
    # lm_eval's tasks try this one when they are loaded, before anybody asks for them.
    metric.compute(["assert add(2, 3)==5"], [["def add(a,b): return a*b"]], [1])
    assert metric.isolation is None


def test_compute_gives_what_code_eval_gives() -> None:
    tests = ["assert add(2, 3) == 5", "assert double(2) == 4"]
    programs = [
        ["def add(a, b): return a + b", "def add(a, b): return a * b"],
        ["def double(a): return a", "def double(a): return"],
    ]

    scores, passed = CodeMetric(True).compute(tests, programs, [1, 2, 5])

    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert passed == {0: [True, False], 1: [False, False]}


def test_pass_at_k_is_the_chance_of_one_in_k() -> None:
    """Of 5 programs 2 pass. Both of 2 drawn fail with probability C(3, 2) / C(5, 2) = 0.3."""
    assert pass_at_k([[True, True, False, False, False]], 2) == pytest.approx(0.7)
    assert pass_at_k([[True, True, False, False, False]], 1) == pytest.approx(0.4)
    assert pass_at_k([[True, True, False, False, False]], 4) == 1.0


def _accept(server: socket.socket) -> None:
    connection, _ = server.accept()
    connection.close()
