from pathlib import Path

import pytest

from gemma_runtime.errors import EvaluationError
from gemma_runtime.lm_eval.answers import AnswerFile


def test_answers_are_found_by_a_later_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    with AnswerFile(path, "int8") as answers:
        answers.add(answers.key("likelihood", (2, 3), (4,)), (-1.25, True))
        answers.add(answers.key("text", (2, 3)), "é\n")

    with AnswerFile(path, "int8") as again:
        assert again.find(again.key("likelihood", [2, 3], [4])) == (-1.25, True)
        assert again.find(again.key("text", (2, 3))) == "é\n"
        assert again.find(again.key("text", (2, 4))) is None
        assert again.find(again.key("likelihood", (2,), (3, 4))) is None


def test_answers_of_another_bundle_are_not_used(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "answers.jsonl", "int8") as answers:
        answers.add(answers.key("text", (2,)), "a")

    with AnswerFile(tmp_path / "answers.jsonl", "int4") as others:
        assert others.find(others.key("text", (2,))) is None


def test_half_a_line_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, "") as answers:
        answers.add("whole", "a")
    whole = path.read_bytes()
    path.write_bytes(whole + b'["half", "b')

    with AnswerFile(path, "") as again:
        assert again.find("whole") == "a"
        again.add("next", "c")

    assert path.read_bytes() == whole + b'["next", "c"]\n'


@pytest.mark.parametrize(
    "line", ["{}", '["a"]', '["a", [1, 2]]', '["a", null]', "x", "[" * 100_000]
)
def test_a_file_of_something_else_gives_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")

    with pytest.raises(EvaluationError, match=r"line 1 of .* is not an answer; delete the file"):
        AnswerFile(path, "")
    assert path.read_text() == line + "\n"


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(EvaluationError, match="can't write"):
        AnswerFile(tmp_path / "file" / "answers.jsonl", "")
