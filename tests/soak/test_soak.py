"""The soak in small, and that it finds a session whose tokens depend on its past."""

import json
import subprocess
import sys

import pytest

from gemma_runtime.bundle import open_bundle
from gemma_runtime.session import Session, open_session
from gemma_runtime.text.tokenizer import Tokenizer
from tests.fuzz.reader import TINY
from tests.soak import __main__ as soak

pytestmark = pytest.mark.serial
pytest.importorskip("llguidance")


def test_a_long_session_stays_flat_and_exact() -> None:
    command = [sys.executable, "-m", "tests.soak", "--tokens", "4000", "--opens", "60", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads(done.stdout)
    assert figures["tokens"] >= 4000
    assert figures["checked"] > 2
    assert figures["opens"] == 60


def test_a_session_that_rewinds_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, figures = open_bundle(TINY), soak.Figures()
    kind = type(_opened())
    rewind = kind.rewind

    def careless(self: Session, to: int) -> int:
        """The caches keep one token that the session has no longer."""
        found = rewind(self, to)
        self._tokens.append(7)  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(kind, "rewind", careless)
    soak.run_long(bundle, Tokenizer(bundle.path("tokenizer")), 3000, 0, figures)
    assert any("fresh" in problem for problem in figures.problems)


def _opened() -> Session:
    with open_session(open_bundle(TINY)) as session:
        return session
