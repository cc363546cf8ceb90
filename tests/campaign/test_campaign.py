"""The campaign in small, and that it finds a careless command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(sys.platform != "linux", reason="faults are loaded with LD_PRELOAD"),
]


def _campaign(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Into a relative folder, as `make campaign` does it."""
    place = os.path.relpath(folder / "campaign")
    command = [sys.executable, "-m", "tests.campaign", place, "--json"]
    return subprocess.run([*command, *flags], capture_output=True, text=True)


@pytest.mark.parametrize("scenario", ["export gguf", "bake"])
def test_disturbed_commands_leave_nothing_half_made(tmp_path: Path, scenario: str) -> None:
    done = _campaign(tmp_path, "--only", scenario, "--kills", "3", "--faults", "6")
    assert done.returncode == 0, done.stderr + done.stdout
    tallies = json.loads(done.stdout)
    assert tallies["kill"]["disturbed"] == 3
    if "SKIPPED" not in done.stderr:
        for kind in ("full disk", "write error", "read error", "rename error"):
            assert tallies[kind]["stopped"] == 1, kind


def test_a_careless_command_is_found(tmp_path: Path) -> None:
    done = _campaign(tmp_path, "--only", "careless", "--kills", "6", "--faults", "0")
    assert done.returncode == 1
    findings = json.loads(done.stdout)["kill"]["findings"]
    assert any("half a result" in finding["problem"] for finding in findings)
