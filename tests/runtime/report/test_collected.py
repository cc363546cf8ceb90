from pathlib import Path

import pytest

from gemma_runtime.errors import ReportError
from gemma_runtime.report.collected import collect
from gemma_runtime.report.figures import read_source
from tests.runtime.report.recorded import FIGURES, KINDS, copy_bundle, recorded, tiny, write


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_another_export_are_refused(tmp_path: Path, kind: str) -> None:
    """A folder that was exported again would get the old export's figures."""
    other = copy_bundle(tmp_path / "tiny", "another model")
    source = read_source(FIGURES / f"{kind}.json")
    assert collect([tiny()], [source]).sources == (source,)
    with pytest.raises(ReportError, match="if a bundle was exported again"):
        collect([other], [source])


def test_two_figures_of_one_kind_and_bundle_are_refused(tmp_path: Path) -> None:
    again = read_source(write(tmp_path / "again.json", recorded("verify")))
    with pytest.raises(ReportError, match=r"verify.json and again.json are both verify's"):
        collect([tiny()], [read_source(FIGURES / "verify.json"), again])


def test_a_bundle_can_t_be_there_twice(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is there twice"):
        collect([tiny(), tiny()], [])


def test_folders_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    bundles = [copy_bundle(tmp_path / f"{name}/gemma", name) for name in ("a", "b")]
    third = copy_bundle(tmp_path / "other", "c")
    labels = [column.label for column in collect([*bundles, third], []).columns]
    assert labels == [str(tmp_path / "a/gemma"), str(tmp_path / "b/gemma"), "other"]


def test_other_sides_of_a_comparison_keep_their_names() -> None:
    collected = collect([tiny()], [read_source(FIGURES / "safety.json")])
    assert collected.name(tiny().digest(), "tiny (exact graph)") == "tiny (exact graph)"
    assert collected.name("elsewhere", "hf gemma") == "hf gemma"
