"""Reads YAML files from anybody: plain data of known types, or one line that says what is wrong.

No tags, no aliases (a few lines of them expand to gigabytes), no key twice, no unknown keys.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from gemma_runtime.errors import MissingExtra, SearchError, nearest_first

if TYPE_CHECKING:
    import yaml

File = TypeVar("File", bound=msgspec.Struct)

_LARGEST = 1 << 20  # bytes
_DEEPEST = 8  # mappings and lists in one another
_WORDS = {"object": "mapping", "array": "list", "null": "nothing"}  # of msgspec, and YAML's


def read_yaml(path: Path, kind: type[File], parts: Mapping[str, type[msgspec.Struct]]) -> File:
    """Read a file as a `kind`. `parts` has the struct below each of its keys, for error messages.

    Raises SearchError, with the place of the mistake.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except OSError as error:
        raise SearchError(f"can't read {path}: {error.strerror}") from error
    if len(raw) > _LARGEST:
        raise SearchError(f"{path} has more than {_LARGEST >> 20} MiB; expected a search file")
    try:
        return msgspec.convert(_load(raw.decode(), path), type=kind)
    except UnicodeDecodeError as error:
        raise SearchError(f"{path} is not UTF-8: {error.reason}") from error
    except OverflowError as error:
        raise SearchError(f"{path} has a number that is too large") from error
    except msgspec.ValidationError as error:
        raise SearchError(f"{path}: {_explain(str(error), kind, parts)}") from error


def place(folder: Path, text: str) -> Path:
    """A path of a file in `folder`, to which it is relative. Raises SearchError for a lost `~`."""
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:
        raise SearchError(f"{text}: {error}") from error


def exists(path: Path) -> bool:
    """Whether there is such a file; there is none with a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _load(text: str, path: Path) -> object:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("pyyaml", "export") from error
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise SearchError(f"{path} is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise SearchError(f"{path}: *{event.anchor} is an alias; write out its value")
        node = yaml.compose(text, yaml.SafeLoader)
        if repeated := None if node is None else _repeated(node):
            raise SearchError(f"{path}: {repeated} is there twice; leave one out")
        content = yaml.safe_load(text) or {}
        json.dumps(content, ensure_ascii=False, default=str, skipkeys=True).encode()
        return content
    except yaml.YAMLError as error:
        raise SearchError(f"{path}: {' '.join(str(error).split())}") from error
    except UnicodeEncodeError as error:
        raise SearchError(f"{path} has half of a surrogate pair, which is no text") from error
    except ValueError as error:  # a date such as 2026-99-99
        raise SearchError(f"{path}: {error}") from error


def _repeated(node: "yaml.Node") -> str | None:
    """A key that one mapping has twice, of which YAML would take the last; None without one."""
    children = list(node.value) if not isinstance(node.value, str) else []
    pairs = [child for child in children if isinstance(child, tuple)]
    names = [str(key.value) for key, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            return repr(name)
    inside = [value for _, value in pairs] or children
    return next((found for child in inside if (found := _repeated(child))), None)


def _explain(message: str, kind: type[Any], parts: Mapping[str, type[msgspec.Struct]]) -> str:
    """msgspec's message in the words of YAML, with the known keys after an unknown one."""
    text, _, place = message.partition(" - at `$")
    where = place.removesuffix("`").removeprefix(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        struct = parts.get(re.split(r"[.\[]", where)[0], kind) if where else kind
        choices = nearest_first(unknown[1], struct.__struct_fields__)
        text = f"unknown key {unknown[1]!r}; expected {choices}"
    for theirs, ours in _WORDS.items():
        text = re.sub(rf"\b{theirs}\b", ours, text)
    text = text[:1].lower() + text[1:]
    return f"{where}: {text}" if where else text
