"""Figures of the committed tiny bundle, recorded by `tests/data/report_figures.py`."""

import json
import shutil
from pathlib import Path
from typing import Any

from gemma_runtime.bundle import MANIFEST, Bundle, open_bundle

DATA = Path(__file__).parents[2] / "data"
FIGURES = DATA / "report"
KINDS = ("verify", "eval", "bench", "sustained", "inspect", "compare", "safety", "results", "phone")


def tiny() -> Bundle:
    return open_bundle(DATA / "tiny")


def recorded(kind: str) -> Any:
    return json.loads((FIGURES / f"{kind}.json").read_text("utf-8"))


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), "utf-8")
    return path


def structured(bundle: Bundle, valid: int = 9) -> dict[str, Any]:
    """What benchmarks/structured.py prints; the tiny bundle's context is too short for it."""
    rate = {
        "way": "constraint",
        "temperature": 0.0,
        "requests": 10,
        "valid_at_once": valid,
        "valid": valid,
        "wrong": 10 - valid,
        "none": 0,
        "new_tokens": 300,
        "model_calls": 170,
    }
    subject = {key: recorded("verify")[key] for key in ("bundle", "digest", "machine")}
    return {**subject, "digest": bundle.digest(), "rates": [rate]}


def copy_bundle(folder: Path, model: str) -> Bundle:
    """The tiny bundle with another model's name, so with another digest."""
    shutil.copytree(DATA / "tiny", folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["model"]["id"] = model
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return open_bundle(folder)
