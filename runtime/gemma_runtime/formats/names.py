"""What names in untrusted files may be."""

from pathlib import Path, PurePosixPath

_LONGEST = 255  # bytes of a file's name, on every file system in use


def stays_inside(name: str) -> bool:
    """Whether a POSIX path leads into the folder it is relative to. Links are not followed."""
    pure = PurePosixPath(name)
    return not (pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name)


def is_file_name(name: object) -> bool:
    """Whether this is a name that a file in a folder can have: no path, not too long."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        return False
    return "\0" not in name and len(name.encode("utf-8", "replace")) <= _LONGEST
