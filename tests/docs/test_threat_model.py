"""The threat model names tests: there are such tests, and no line is without one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
_NAMED = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)


def test_every_named_test_exists() -> None:
    assert len(_NAMED) > 30
    missing = [f"{path}::{name}" for path, name in _NAMED if name not in _tests(ROOT / path)]
    assert missing == []


def test_every_line_names_a_test() -> None:
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", TEXT, re.M)
    assert [what for what, tests in rows if what != "attempt" and "::test_" not in tests] == []


def _tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
