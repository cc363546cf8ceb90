"""The page in a real browser: light, dark, printed, and without requests."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemma_runtime.report.collected import collect
from gemma_runtime.report.figures import read_source
from gemma_runtime.report.page import render_page
from tests.runtime.report.recorded import FIGURES, KINDS, tiny

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DARK, _LIGHT = 0, 1  # of blink's setting


@pytest.fixture(scope="module")
def browser() -> str:
    found = [path for path in map(shutil.which, _BROWSERS) if path is not None]
    if not found:
        pytest.skip(f"none of {', '.join(_BROWSERS)} is installed, so no browser reads the page")
    return found[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    sources = [read_source(FIGURES / f"{kind}.json") for kind in KINDS]
    path.write_bytes(render_page(collect([tiny()], sources)))
    return path


@pytest.mark.parametrize(("scheme", "is_dark"), [(_LIGHT, False), (_DARK, True)])
def test_paper_and_text_follow_the_reader_s_choice(
    browser: str, page: Path, tmp_path: Path, scheme: int, is_dark: bool
) -> None:
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "shot.png"
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    _browse(browser, tmp_path, page, setting, "--window-size=1100,1600", f"--screenshot={shot}")
    with image.open(shot) as picture:
        gray = picture.convert("L")
        paper, histogram = gray.getpixel((2, 2)), gray.histogram()
    assert (paper < 60) is is_dark
    assert (paper > 200) is not is_dark
    opposite = histogram[190:] if is_dark else histogram[:70]
    assert sum(opposite) > 3000  # text that can be read


def test_the_page_prints(browser: str, page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    _browse(browser, tmp_path, page, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 1 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 12


def test_no_request_leaves(browser: str, page: Path, tmp_path: Path) -> None:
    """The browser logs requests with the page that wanted them; its own have none."""
    assert _requests(browser, page, tmp_path / "page") == []


def test_a_request_would_be_noticed(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "asking.html"
    page.write_text("<!doctype html><img src='http://elsewhere.test/x.png'>")
    assert _requests(browser, page, tmp_path / "asking") == ["http://elsewhere.test/x.png"]


def _requests(browser: str, page: Path, folder: Path) -> list[str]:
    folder.mkdir()
    log = folder / "log.json"
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND"
    shot = f"--screenshot={folder / 'shot.png'}"
    _browse(browser, folder, page, nowhere, f"--log-net-log={log}", shot)
    events: list[dict[str, Any]] = json.loads(log.read_bytes())["events"]
    asked = [event.get("params", {}) for event in events]
    return [one["url"] for one in asked if one.get("initiator", "not an origin") != "not an origin"]


def _browse(browser: str, folder: Path, page: Path, *options: str) -> None:
    """Without a sandbox, which needs rights that containers lack; the page has no script."""
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile, *options]
    subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True)
