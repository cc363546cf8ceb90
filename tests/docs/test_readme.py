"""The README and the pages match the code: commands, tables, links, generated parts, picture."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text("utf-8")
_EVERYWHERE = {"--version", "--install-completion", "--show-completion"}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def test_the_generated_parts_are_up_to_date() -> None:
    check = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_in_an_example_command_exists(page: Path) -> None:
    commands = re.findall(r"(gemma-export|gemma-runtime)( [^\n`|]*(?:\\\n[^\n]*)*)", _text(page))
    wrong = [
        f"{name} {flag}"
        for name, arguments in commands
        for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", arguments)
        if flag not in _flags(name) | {"--help"}
    ]
    assert wrong == []


def test_the_export_page_explains_every_flag_of_gemma_export() -> None:
    flags = _flags("gemma-export") - _EVERYWHERE
    explained = set(re.findall(r"--[a-z][a-z-]+", _text(DOCS / "export.md")))
    assert explained - flags == set()
    own = set(re.findall(r"--[a-z][a-z-]+", _text(DOCS / "search.md")))  # of `search`
    assert flags - explained - own == set()


def test_every_extra_is_explained() -> None:
    project = tomllib.loads(_text(ROOT / "pyproject.toml"))["project"]
    explained = re.findall(r"`([a-z]+)`(?=[^|]*\|[^|]*\|$)", _text(DOCS / "install.md"), re.M)
    assert set(explained) == set(project["optional-dependencies"]) - {"export"}


def test_the_readme_names_every_target() -> None:
    from gemma_export.targets import TARGETS

    named = re.findall(r"\[`([a-z]+)`\]\(docs/targets/", _section("## Which target"))
    assert set(named) == set(TARGETS)


def test_the_recommended_recipes_exist() -> None:
    from gemma_export.quantize.recipe import RECIPES

    for text, columns in (
        (_section("## Which recipe"), slice(2, 4)),
        (_section("## Which recipe", DOCS / "quantization.md"), slice(2, 3)),
    ):
        lines = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
        rows = [" ".join(line[columns]) for line in lines]
        recommended = [
            name for row in rows for name in re.findall(r"`([a-z0-9-]+)(?: --.*?)?`", row)
        ]
        assert len(recommended) >= 6
        assert set(recommended) <= set(RECIPES)


def test_the_losses_in_the_readme_are_those_in_the_measurements() -> None:
    measured = _text(DOCS / "measurements.md")
    rows = re.findall(r"^\| (?:ours|llama).*\| ([\d.]+) \| ([\d.]+ %) \| ([\d.]+) \|", README, re.M)
    assert len(rows) >= 5
    assert [row for row in rows if f"| {' | '.join(row)} |" not in measured] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", _text(page))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_picture_shows_no_path_and_loads_no_file() -> None:
    picture = (DOCS / "assets" / "run.svg").read_text("utf-8").replace("&#160;", " ")
    assert "PASS" in picture
    assert re.findall(r"(?<![\w.<])/(?:home|root|tmp|work|usr|Users)\b[^<]*", picture) == []
    assert "@font-face" not in picture
    assert re.findall(r"(?:href|src)=|url\(['\"]?http", picture) == []


def test_the_site_loads_no_file_from_other_servers(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(https?:[^\" >]+)"
        assert re.findall(loaded, _text(page)) == [], page


def _flags(name: str) -> set[str]:
    """Every flag of a program, including those of its subcommands."""
    from gemma_export.cli import command_line
    from gemma_runtime.cli import app

    return _flags_of(get_command(command_line() if name == "gemma-export" else app))


def _flags_of(command: object) -> set[str]:
    """Every flag of a command and its subcommands. Typed `object`, as typer hides its classes."""
    inner = getattr(command, "commands", {}).values()
    own = {flag for one in command.params for flag in one.opts if flag[0] == "-"}  # type: ignore[attr-defined]
    return own.union(*map(_flags_of, inner))


def _text(page: Path) -> str:
    return page.read_text("utf-8")


def _section(heading: str, page: Path = ROOT / "README.md") -> str:
    """The section whose heading begins with `heading`, up to the next second-level heading."""
    after = _text(page).partition(f"\n{heading}")[2]
    assert after, f"{page.name} has no section {heading!r}"
    return re.split(r"^## ", after, maxsplit=1, flags=re.M)[0]
