"""Evaluation text and the names of its languages."""

from pathlib import Path

import pytest

from gemma_runtime.errors import TokenizerError
from gemma_runtime.proof.texts import is_tag, language_of, read_segments


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("de", "de"),
        ("pt-BR", "pt-BR"),
        ("notes.zh_Hans", "zh_Hans"),
        ("hi/1", "hi"),
        ("guide/hi/first.de", "hi"),
        ("release 1.2", "release 1.2"),
        ("fruit", "fruit"),
    ],
)
def test_a_folder_or_a_tag_names_the_language(name: str, language: str) -> None:
    assert language_of(name) == language


def test_tags_are_told_from_words() -> None:
    assert all(map(is_tag, ["hi", "fil", "sr_Latn", "zh-Hant-TW"]))
    assert not any(map(is_tag, ["fruit", "1", "DE", "de ", ""]))


def test_a_folder_gives_every_file_of_its_subfolders(tmp_path: Path) -> None:
    for name in ("hi/1.txt", "hi/2.txt", "de.txt", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "blank.txt").write_text(" \n")
    assert read_segments(tmp_path) == {"hi/1": "hi/1.txt", "hi/2": "hi/2.txt", "de": "de.txt"}


def test_several_files_are_a_text_each_and_one_file_its_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("one\ntwo\n\nthree\n\n\n\n")
    (tmp_path / "hi.txt").write_text("four")
    assert read_segments(tmp_path / "de.txt") == {"1": "one\ntwo", "2": "three"}
    assert list(read_segments(tmp_path / "de.txt", tmp_path / "hi.txt")) == ["de", "hi"]


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    """The second one replaced the first one."""
    (tmp_path / "de.txt").write_text("one")
    (tmp_path / "de.md").write_text("two")
    with pytest.raises(TokenizerError, match="two texts are called 'de'"):
        read_segments(tmp_path)


def test_text_that_is_empty_missing_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no text"):
        read_segments(tmp_path)
    with pytest.raises(TokenizerError, match="can't read"):
        read_segments(tmp_path / "missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="can't read"):
        read_segments(tmp_path)
