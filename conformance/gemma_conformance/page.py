"""Writes the matrix as JSON and as a page without scripts."""

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import msgspec

from gemma_conformance.matrix import Cell, Matrix, Row
from gemma_runtime.errors import ReportError
from gemma_runtime.report.page import page_environment, write_page


def render_page(matrix: Matrix) -> bytes:
    """The page as UTF-8. The same matrix gives the same bytes."""
    page = _environment().get_template("page.html.j2").render(matrix=matrix, cell_of=_cell_of)
    return page.encode("utf-8", "replace")


def check_outputs(paths: Sequence[Path]) -> None:
    """Raise ReportError unless the files can be written. Existing files are replaced."""
    for path in paths:
        above = path.absolute().parent
        if path.is_dir() or not above.is_dir():
            found = "a folder" if path.is_dir() else f"in {above}, which is not a folder"
            raise ReportError(f"{path} is {found}; give a file to write")
        if not os.access(above, os.W_OK):
            raise ReportError(f"can't write into {above}: permission denied")


def write_matrix(matrix: Matrix, json: Path | None, html: Path | None) -> None:
    # Infinity, the difference of what isn't a number, has no JSON: it becomes null.
    for path, content in (
        (json, msgspec.json.format(msgspec.json.encode(matrix)) + b"\n"),
        (html, render_page(matrix)),
    ):
        if path is not None:
            write_page(path, content)


def _cell_of(row: Row, trait: str) -> Cell | None:
    return next((cell for cell in row.cells if cell.trait == trait), None)


def _environment() -> jinja2.Environment:
    environment = page_environment("gemma_conformance")
    environment.filters["delta"] = lambda value: "" if value is None else f"{value:.2g}"
    return environment
