"""What 8 bits cost the real 270M in each of 18 languages."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import pytest

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.calibrate import text
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.proof.evaluate import evaluate_bundle
from gemma_runtime.proof.language_figures import TextFigures

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
LANGUAGES = [
    "en", "es", "fr", "de", "it", "pt", "nl", "ru", "zh",
    "ja", "hi", "bn", "ar", "th", "vi", "uk", "he", "sw",
]  # fmt: skip
_CHARACTERS = 200  # of each language
_MOST = 3.0  # times the median language's loss
Figures = Mapping[str, TextFigures]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of Django's messages, which no calibration text contains."""
    folder = tmp_path_factory.mktemp("languages")
    script = [sys.executable, str(ROOT / "benchmarks" / "language_texts.py"), str(folder)]
    done = subprocess.run([*script, "--kinds", "messages", "--pieces", "1"], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"can't fetch evaluation text: {done.stderr.decode()[-200:]}")
    short = folder / "short"
    short.mkdir()
    for language in LANGUAGES:
        whole = (folder / "messages" / language / "1.txt").read_text("utf-8")
        (short / f"{language}.txt").write_text(whole[:_CHARACTERS], "utf-8")
    return short


def losses(recipe: str, texts: Path, work: Path) -> Figures:
    """Figures by language. A part of the calibration text is enough to tell the recipes apart."""
    lines = Path(text.__file__).with_name("calibration.txt").read_text("utf-8").splitlines()
    calibration = work / "calibration.txt"
    calibration.write_text("\n".join(lines[::64]), "utf-8")
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe(recipe),
        checkpoint="demo",
        calibration=calibration,
        context_length=512,
        prefill_length=128,
        eval_text=texts,
        output=work / "bundle",
    )
    (result,) = export_bundles(request, QuietReporter())
    return {figures.name: figures for figures in evaluate_bundle(result.bundle).texts}


def median_kl(figures: TextFigures) -> float:
    assert figures.teacher is not None
    return figures.teacher.median_kl


def over_the_median(by_language: Figures) -> dict[str, float]:
    """Each language's median KL, in times of the median language's.

    Medians of positions, because one position can make most of the mean of so short a text.
    """
    typical = median(median_kl(figures) for figures in by_language.values())
    return {name: median_kl(figures) / typical for name, figures in by_language.items()}


def test_smoothed_8_bits_lose_about_as_much_in_every_language(texts: Path, tmp_path: Path) -> None:
    ratios = over_the_median(losses("int8-smooth", texts, tmp_path))
    assert sorted(ratios) == sorted(LANGUAGES)
    assert max(ratios.values()) < _MOST, ratios


def test_plain_8_bits_lose_most_in_bengali_and_hindi(texts: Path, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    ratios = over_the_median(losses("int8", texts, tmp_path))
    assert {name for name, ratio in ratios.items() if ratio > _MOST} == {"bn", "hi"}, ratios
