"""The published files: their content, and the checks of a package index."""

import ast
import email
import email.message
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distribution import ROOT, Distribution, build, find_distribution

# Data files that the installed packages read.
DATA_FILES = [
    "gemma_export/py.typed",
    "gemma_export/quantize/calibrate/calibration.txt",
    "gemma_runtime/py.typed",
    "gemma_runtime/report/templates/page.css",
    "gemma_runtime/report/templates/page.html.j2",
    "gemma_runtime/report/templates/parts.html.j2",
    "gemma_runtime/native/CMakeLists.txt",
    "gemma_runtime/native/aarch64-linux-gnu.cmake",
    "gemma_runtime/native/gemma_native.cpp",
]


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    folder = tmp_path_factory.mktemp("hook")
    build(ROOT / "optimum_hook", folder)
    return find_distribution(folder)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    folder = tmp_path_factory.mktemp("kit")
    build(ROOT / "conformance", folder)
    return find_distribution(folder)


def test_the_wheel_contains_both_packages_and_their_data_files(distribution: Distribution) -> None:
    names = _wheel_names(distribution.wheel)
    folders = {name.partition("/")[0] for name in names}
    assert sorted(folders) == ["gemma_export", f"{_stem(distribution)}.dist-info", "gemma_runtime"]
    assert [name for name in DATA_FILES if name not in names] == []
    assert f"{_stem(distribution)}.dist-info/licenses/LICENSE" in names


def test_every_source_file_is_in_the_wheel(distribution: Distribution) -> None:
    names = _wheel_names(distribution.wheel)
    for folder in ("export", "runtime"):
        packages = [path for path in (ROOT / folder).glob("gemma_*") if path.is_dir()]
        files = [path for package in packages for path in package.rglob("*.py")]
        assert len(files) > 30
        missing = {path.relative_to(ROOT / folder).as_posix() for path in files} - names
        assert missing == set()


def test_the_sdist_contains_the_sources_without_apps_and_tests(distribution: Distribution) -> None:
    with tarfile.open(distribution.sdist) as tar:
        paths = [Path(name).relative_to(_stem(distribution)) for name in tar.getnames()]
    assert {path.parts[0] for path in paths} == {
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "export",
        "pyproject.toml",
        "runtime",
    }


def test_the_optimum_hook_is_one_file_in_optimum_s_namespace(hook: Distribution) -> None:
    """In the main wheel, this file made `import optimum` succeed without optimum."""
    files = [name for name in _wheel_names(hook.wheel) if ".dist-info/" not in name]
    assert files == ["optimum/commands/register/register_gemma.py"]


def test_the_conformance_kit_has_its_runners_and_its_page(kit: Distribution) -> None:
    package = ROOT / "conformance" / "gemma_conformance"
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".css", ".j2")]
    assert len(files) > 15
    names = {path.relative_to(package.parent).as_posix() for path in files}
    assert names - _wheel_names(kit.wheel) == set()


def test_all_distributions_have_the_same_version(
    distribution: Distribution, hook: Distribution, kit: Distribution
) -> None:
    versions = [_metadata(one.wheel)["Version"] for one in (distribution, hook, kit)]
    assert len(set(versions)) == 1
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "## [Unreleased]" in changelog or f"## [{versions[0]}]" in changelog


def test_a_package_index_can_render_the_descriptions(
    distribution: Distribution, hook: Distribution, kit: Distribution
) -> None:
    pytest.importorskip("twine")
    files = [str(path) for one in (distribution, hook, kit) for path in (one.wheel, one.sdist)]
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_import_of_the_runtime_is_a_base_dependency(distribution: Distribution) -> None:
    """flatbuffers was imported but not declared; only executorch installed it.

    Imports inside functions don't count: packages of extras are imported that way. Nor does the
    module with lm_eval's model, a subclass, which is imported that way itself.
    """
    requirements = _metadata(distribution.wheel).get_all("Requires-Dist") or []
    declared = {line.partition(">")[0] for line in requirements if "extra ==" not in line}
    runtime = ROOT / "runtime" / "gemma_runtime"
    files = {*runtime.rglob("*.py")} - {runtime / "lm_eval" / "model.py"}
    imported = {name for path in files for name in _top_level_imports(path)}
    assert len(imported) > 20
    assert imported - sys.stdlib_module_names - {"gemma_runtime"} - declared == set()


def test_pre_commit_pins_the_same_ruff_as_the_dev_extra() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        developers = tomllib.load(file)["project"]["optional-dependencies"]["dev"]
    (pinned,) = [line for line in developers if line.startswith("ruff==")]
    config = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert f"rev: v{pinned.removeprefix('ruff==')}\n" in config


def _top_level_imports(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.partition(".")[0]


def _wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _metadata(wheel: Path) -> "email.message.Message[str, str]":
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def _stem(distribution: Distribution) -> str:
    """`gemma_export-0.1.0`"""
    return distribution.sdist.name.removesuffix(".tar.gz")
