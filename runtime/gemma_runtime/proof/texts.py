"""Reads evaluation text. Names of files and folders tell its languages.

`de.txt`, `notes.de.txt`, `de/1.txt` and `de/2.txt` are all text in German. Other names are names of
texts, and everything below holds for them too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gemma_runtime.errors import TokenizerError

LONGEST = 256  # tokens used per segment, bos included
_TAG = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")  # hi, pt-BR, zh_Hans: BCP 47 or POSIX


def read_segments(*paths: Path) -> dict[str, str]:
    """Texts by name: the paragraphs of one file, or every file of several and of folders.

    Blank lines separate paragraphs. The name of a file in a folder has the subfolder in front:
    `de/1`. Hidden files are left out. Raises TokenizerError if there is no text, if two files have
    one name, or if a file is not UTF-8.
    """
    files = [found for path in paths for found in _named_files(path)]
    try:
        parts = [(name, file.read_text("utf-8")) for name, file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"can't read {' '.join(map(str, paths))}: {error}") from error
    if len(paths) == 1 and not paths[0].is_dir():
        paragraphs = parts[0][1].split("\n\n")
        parts = [(str(index), text) for index, text in enumerate(paragraphs, 1)]
    texts: dict[str, str] = {}
    for name, text in parts:
        if name in texts:
            raise TokenizerError(f"two texts are called {name!r}; rename one, or use subfolders")
        if text.strip():
            texts[name] = text
    if not texts:
        raise TokenizerError(
            f"{' '.join(map(str, paths))} has no text; expected a text file or a folder of them"
        )
    return texts


def language_of(name: str) -> str:
    """The language of a segment: its folder's name, the tag at its end, or its own name."""
    folder, _, stem = name.rpartition("/")
    if folder:
        return folder.rpartition("/")[2]
    tag = stem.rpartition(".")[2]
    return tag if is_tag(tag) else stem


def is_tag(text: str) -> bool:
    """Whether this looks like the tag of a language."""
    return _TAG.fullmatch(text) is not None


def encode_segments(
    texts: Mapping[str, str], encode: Callable[[str], list[int]], bos: int, context_length: int
) -> dict[str, list[int]]:
    """Token ids by name, bos first, cut to LONGEST; texts without tokens are left out.

    Exporter and runtime both use this, because a stored segment is looked up by its token ids.
    """
    longest = min(LONGEST, context_length)
    segments = {name: [bos, *encode(text)][:longest] for name, text in texts.items()}
    return {name: ids for name, ids in segments.items() if len(ids) > 1}


def _named_files(path: Path) -> Sequence[tuple[str, Path]]:
    if not path.is_dir():
        return [(path.stem, path)]
    inside = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    shown = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    return [(file.with_suffix("").as_posix(), path / file) for file in shown]
