"""The workflows of the public repository, as far as they can be checked without running them."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Written by an earlier step, not kept here.
MADE = (".venv", "installed", "out", "dist", "GemmaDemo.xcodeproj")
FILE = re.compile(r"^\.?[\w.-]+(/[\w.-]+)+$|^[\w-]+\.(sh|ya?ml|py|toml|txt)$")


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values():
        yield from job["steps"]


def missing(step: dict[str, Any]) -> list[str]:
    """The files and folders that a step names and that are not in the repository."""
    folder = ROOT / step.get("working-directory", ".")
    if not folder.is_dir():
        return [folder.name]
    words = shlex.split(step.get("run", "").replace("\\\n", " "), comments=True)
    paths = [after for before, after in pairwise(words) if "path" in before]
    paths += [word for word in words if FILE.match(word)]
    return [path for path in paths if not path.startswith(MADE) and not (folder / path).exists()]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_only_files_that_exist(workflow: Path) -> None:
    assert [name for step in steps(workflow) for name in missing(step)] == []


@pytest.mark.parametrize(
    "step",
    [
        {"run": "scripts/gone.sh 1"},
        {"run": "./gradlew test", "working-directory": "ios_demo"},
        {"run": "xcodegen --spec gone.yml", "working-directory": "ios_demo"},
        {"run": "swift test --package-path Gone", "working-directory": "ios_demo"},
        {"run": "make", "working-directory": "gone"},
    ],
)
def test_a_file_that_is_gone_is_found(step: dict[str, Any]) -> None:
    assert len(missing(step)) == 1


def test_the_apps_are_built_as_their_readmes_say() -> None:
    commands = [step.get("run", "") for step in steps(ROOT / ".github/workflows/ci.yml")]
    assert any("./gradlew" in run and "assembleRelease" in run for run in commands)
    readme = (ROOT / "ios_demo/README.md").read_text("utf-8")
    (spec,) = set(re.findall(r"xcodegen (--spec [\w.-]+)", readme))
    assert f"xcodegen {spec}" in commands
