"""Names of files that untrusted files give. Imports no torch."""

from pathlib import Path

_LONGEST_NAME = 255  # bytes, on every file system in use


def is_file_name(name: object) -> bool:
    """Whether this is a name that a file in a folder can have: no path, not too long."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        return False
    return "\0" not in name and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
