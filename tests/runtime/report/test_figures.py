import json
import math
from pathlib import Path

import pytest

from gemma_runtime.errors import ReportError
from gemma_runtime.report.figures import (
    Evaluated,
    Structured,
    TaskScores,
    Verified,
    read_source,
    read_sources,
)
from tests.runtime.report.recorded import FIGURES, KINDS, recorded, structured, tiny, write


def test_every_command_s_json_is_known_by_its_content(tmp_path: Path) -> None:
    for kind in KINDS:
        path = write(tmp_path / "a file.json", recorded(kind))
        names = {"results": "lm-eval", "sustained": "bench --sustained", "phone": "phone app"}
        assert read_source(path).kind == names.get(kind, kind)


def test_figures_arrive_as_they_were_printed() -> None:
    verified = read_source(FIGURES / "verify.json").figures
    evaluated = read_source(FIGURES / "eval.json").figures
    scores = read_source(FIGURES / "results.json").figures
    assert isinstance(verified, Verified)
    assert verified.verification.lowering.mean_kl == recorded("verify")["lowering"]["mean_kl"]
    assert isinstance(evaluated, Evaluated)
    assert {text.name for text in evaluated.evaluation.texts} == {"en", "de"}
    assert isinstance(scores, TaskScores)
    assert scores.config.bundle_digest == tiny().digest()
    assert scores.questions["tiny_task"]["effective"] == 4


def test_the_structured_benchmark_prints_what_is_read(tmp_path: Path) -> None:
    """Its script is no package, so its fields are compared by name."""
    script = (Path(__file__).parents[3] / "benchmarks/structured.py").read_text("utf-8")
    figures = read_source(write(tmp_path / "s.json", structured(tiny()))).figures
    assert isinstance(figures, Structured)
    for name in structured(tiny())["rates"][0]:
        assert f"\n    {name}: " in script


def test_a_broken_model_s_missing_numbers_are_nan(tmp_path: Path) -> None:
    """JSON has no NaN, so a page for a broken bundle could not be made."""
    value = recorded("verify")
    value["lowering"]["mean_kl"] = None
    value["worst"][0]["kl"] = None
    figures = read_source(write(tmp_path / "v.json", value)).figures
    assert isinstance(figures, Verified)
    assert math.isnan(figures.verification.lowering.mean_kl)
    assert math.isnan(figures.verification.worst[0].kl)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "has no figures; expected the --json output of gemma-runtime verify"),
        ('{"verdict": "PASS"}', "has no figures"),
        ("[1, 2]", "has no figures"),
        ("not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"rates": 3}', "is not the JSON of this version's structured.py"),
        ('{"verdict": "PASS", "lowering": {}}', "is not the JSON of this version's verify"),
    ],
)
def test_what_is_not_figures_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ReportError, match=said) as raised:
        read_source(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("field", ["verdict", "limits", "worst", "by_golden", "digest", "machine"])
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, field: str) -> None:
    value = {**recorded("verify"), field: 3}
    with pytest.raises(ReportError, match=f"verify: .*{field}"):
        read_source(write(tmp_path / "v.json", value))


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    value = {**recorded("verify"), "bundle": "\ud800x"}
    figures = read_source(write(tmp_path / "v.json", value)).figures
    assert isinstance(figures, Verified)
    assert figures.subject.bundle == "?x"


def test_a_folder_gives_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below/a.json", recorded("verify"))
    write(tmp_path / "b.json", recorded("bench"))
    (tmp_path / "samples_x.jsonl").write_text("{}\n")
    assert [source.name for source in read_sources([tmp_path])] == ["b.json", "a.json"]


def test_missing_files_and_empty_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"can't read .*gone.json: No such file"):
        read_sources([tmp_path / "gone.json"])
    with pytest.raises(ReportError, match=r"has no \.json files"):
        read_sources([tmp_path])


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_runtime.report.figures._LARGEST", 1000)
    path = tmp_path / "big.json"
    path.write_text(json.dumps(["x" * 2000]))
    with pytest.raises(ReportError, match="has more than"):
        read_source(path)
