"""The golden on which quantized weights are furthest from the float32 ones."""

from dataclasses import replace
from pathlib import Path

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.worst_golden import WorstGolden, worst_golden, worst_of_weights
from tests.runtime.manifests import goldens_of, write_bundle

QUALITY = Agreement(32, 0.9, 1, 1.0, 0.1, 0.02, 0.3)
TINY = Path(__file__).parents[2] / "data" / "tiny"


def test_the_worst_golden_is_named_with_its_own_figures(tmp_path: Path) -> None:
    goldens = goldens_of({"prose": 0.01, "languages": 0.0712, "code": 0.02})

    worst = worst_of_weights(write_bundle(tmp_path / "bundle", goldens=goldens))

    assert worst == WorstGolden("languages", 32, 0.0712)
    assert str(worst) == "worst golden: languages, KL 0.0712"


def test_one_golden_alone_is_not_the_worst(tmp_path: Path) -> None:
    assert worst_of_weights(write_bundle(tmp_path / "a", goldens=goldens_of({"a": 0.1}))) is None
    assert worst_of_weights(write_bundle(tmp_path / "b")) is None


def test_a_golden_without_a_number_is_the_worst() -> None:
    worst = worst_golden({"a": QUALITY, "b": replace(QUALITY, mean_kl=float("nan")), "c": QUALITY})

    assert worst is not None
    assert worst.name == "b"


def test_bundles_without_goldens_or_of_earlier_exports_name_none() -> None:
    tiny = open_bundle(TINY)  # whose goldens have logits only

    assert worst_of_weights(tiny) is None
    assert worst_of_weights(Bundle(TINY, replace(tiny.manifest, roles={}))) is None
