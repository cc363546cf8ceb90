"""Packs an APK before it is signed, and checks one after it was.

    python android_demo/pack_apk.py pack RESOURCES.apk DEX.zip LIBRARIES OUTPUT.apk
    python android_demo/pack_apk.py check SIGNED.apk

Android maps native libraries where they lie in the APK. So they are stored, not deflated, and each
begins at a multiple of the largest page, 16 KB.
"""

import struct
import sys
from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

ABI = "arm64-v8a"
PAGE = 16384
WORD = 4  # what zipalign asks of every other stored entry
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Padding whose first number is the alignment; apksigner keeps that of entries that have it.
_ALIGNMENT = 0xD935


def pack(resources: Path, dex: Path, libraries: Path, output: Path) -> None:
    with output.open("wb") as file, ZipFile(file, "w") as apk:

        def add(name: str, content: bytes, method: int) -> None:
            entry = ZipInfo(name, (1981, 1, 1, 1, 1, 2))
            entry.compress_type = method
            if method == ZIP_STORED:
                offset = file.tell() + _LOCAL_HEADER.size + len(name)
                entry.extra = _padding(offset, alignment(name))
            apk.writestr(entry, content)

        with ZipFile(resources) as source:
            for entry in source.infolist():
                add(entry.filename, source.read(entry), entry.compress_type)
        with ZipFile(dex) as source:
            for name in source.namelist():
                if name.endswith(".dex"):
                    add(name, source.read(name), ZIP_DEFLATED)
        for library in sorted(libraries.glob("*.so")):
            add(f"lib/{ABI}/{library.name}", library.read_bytes(), ZIP_STORED)


def alignment(name: str) -> int:
    return PAGE if name.endswith(".so") else WORD


def _padding(offset: int, multiple: int) -> bytes:
    """An extra field after which the entry's data, which would be at `offset`, is aligned."""
    head = 6
    zeros = -(offset + head) % multiple
    return struct.pack("<3H", _ALIGNMENT, 2 + zeros, multiple) + bytes(zeros)


def problems(apk: Path) -> list[str]:
    """What is wrong with an APK's entries; empty if nothing is."""
    with apk.open("rb") as file, ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            return [f"{damaged} is damaged"]
        entries = {entry.filename: entry for entry in archive.infolist()}
        needed = ("classes.dex", "resources.arsc")
        wrong = [f"there is no {name}" for name in needed if name not in entries]
        stored = [e.filename for e in entries.values() if e.compress_type == ZIP_STORED]
        libraries = [name for name in entries if name.startswith("lib/")]
        mapped = [*libraries, *(name for name in entries if name == "resources.arsc")]
        wrong += [f"{name} is deflated" for name in mapped if name not in stored]
        for name in stored:
            offset = _data_offset(file, entries[name])
            if offset % alignment(name):
                wrong.append(f"{name} lies at {offset}, which is no multiple of {alignment(name)}")
        if not libraries:
            wrong.append("there is no native library")
        others = [name for name in libraries if Path(name).parts[1] != ABI]
        wrong += [f"{name} is for another processor" for name in others]
        for name in entries:
            if name.endswith(".dex") and not archive.read(name).startswith(b"dex\n0"):
                wrong.append(f"{name} is no dex file")
    return wrong


def _data_offset(file: IO[bytes], entry: ZipInfo) -> int:
    file.seek(entry.header_offset)
    *_, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return int(entry.header_offset + _LOCAL_HEADER.size + name + extra)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["pack", *paths] if len(paths) == 4:
            pack(*map(Path, paths))
            return 0
        case ["check", path]:
            wrong = problems(Path(path))
            print("\n".join(wrong) or f"{Path(path).stat().st_size / 1e6:.1f} MB")
            return min(len(wrong), 1)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
