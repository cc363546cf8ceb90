"""`gemma-export cache`: list and remove what is in the cache folder. Does not import torch.

Slow imports are made inside functions, so that `--help` stays fast.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_runtime.cache import ABOUT, PACKED, TEACHERS, About, cache_folder
from gemma_runtime.errors import CacheError

app = typer.Typer(help="List and remove entries of the cache folder.")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}
_SHOWN = 12  # characters of a key that are shown; any unique prefix selects an entry


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the cache; its files are used and removed together."""

    key: str
    kind: str  # store, calibration, teacher, packed, runner or weights
    path: Path
    model: str = ""
    recipe: str = ""

    def files(self) -> list[Path]:
        """All files of the entry except locks; a store's include those of an interrupted export."""
        inside = self.path.rglob("*") if self.path.is_dir() else None
        files = inside or self.path.parent.glob(f"{self.path.stem}.*")
        return [path for path in files if path.is_file() and path.suffix != ".lock"]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    @property
    def age_seconds(self) -> float:
        """Seconds since the entry was last written or used."""
        newest = max((path.stat().st_mtime for path in self.files()), default=0.0)
        return max(0.0, time.time() - newest)


def find_entries(folder: Path) -> list[Entry]:
    """All entries of a cache folder, oldest first. Ignores files that we did not create."""
    entries = [*_stores(folder / "stores"), *_described(folder / "calibrated", "calibration")]
    entries += _described(folder / TEACHERS, "teacher")
    entries += _described(folder / PACKED, "packed")
    entries += [Entry(p.name, "runner", p) for p in _inside(folder / "native") if p.is_dir()]
    entries += [Entry(p.name, "weights", p) for p in _inside(folder) if p.suffix == ".gguf"]
    return sorted(entries, key=lambda entry: -entry.age_seconds)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _stores(folder: Path) -> Iterator[Entry]:
    for stem in sorted({p.name.split(".")[0] for p in _inside(folder) if p.suffix != ".lock"}):
        path = folder / f"{stem}.safetensors"
        metadata = _metadata(path)
        model, recipe = (str(metadata.get(name, "")) for name in ("model", "recipe"))
        yield Entry(stem, "store", path, model, recipe)


def _described(folder: Path, kind: str) -> Iterator[Entry]:
    """The folders in a folder, with what their `about.json` says."""
    for path in _inside(folder):
        if path.is_dir() and ".partial-" not in path.name:
            about = _about(path)
            yield Entry(path.name, kind, path, about.model, about.recipe)


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file; empty if the file can't be read."""
    import msgspec

    from gemma_runtime.formats.json_bytes import decode_json

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = decode_json(file.read(min(length, 100_000_000)), dict[str, Any])
        return dict(header["__metadata__"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return {}


def _about(folder: Path) -> About:
    import msgspec

    from gemma_runtime.formats.json_bytes import decode_json

    try:
        return decode_json((folder / ABOUT).read_bytes(), About)
    except (OSError, msgspec.DecodeError):
        return About("", "", "")


def remove_entry(entry: Entry) -> bool:
    """Remove an entry. Returns False and keeps it if a running export uses it."""
    from gemma_export.cache_lock import removable

    with removable(entry.path) as free:
        if free:
            for path in entry.files():
                path.unlink(missing_ok=True)
            if entry.path.is_dir():
                shutil.rmtree(entry.path)
        return free


@app.command("list")
def list_cache(json: _Json = False) -> None:
    """List the cache: model, recipe, size and time since the last use."""
    folder = cache_folder()
    entries = find_entries(folder)
    if json:
        import msgspec

        rows = [{**asdict(e), "bytes": e.bytes, "age_seconds": e.age_seconds} for e in entries]
        sys.stdout.buffer.write(msgspec.json.encode(rows, enc_hook=str) + b"\n")
        return
    from rich.console import Console
    from rich.table import Table

    from gemma_runtime.machine import format_bytes

    total = format_bytes(sum(entry.bytes for entry in entries))
    table = Table("key", "kind", "model", "recipe", "size", "used", box=None, title=f"{folder}")
    for entry in entries:
        key = entry.key if entry.kind == "weights" else entry.key[:_SHOWN]
        used = f"{_age(entry.age_seconds)} ago"
        row = (entry.kind, entry.model, entry.recipe, format_bytes(entry.bytes), used)
        table.add_row(key, *row)
    Console().print(table)
    print(f"{len(entries)} entries, {total}")


@app.command()
def remove(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys as `list` shows them, or unique prefixes.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
) -> None:
    """Remove entries. Entries that a running export uses are kept."""
    if bool(keys) == everything:
        raise typer.BadParameter("give KEY… or --all; run gemma-export cache list to see the keys")
    entries = find_entries(cache_folder())
    _remove(entries if everything else [_named(entries, key) for key in keys or []])


@app.command()
def prune(
    older_than: Annotated[str, typer.Option(help="Age since the last use: 12h, 30d, 8w.")],
) -> None:
    """Remove entries that have not been used for some time."""
    limit = _seconds(older_than)
    _remove([entry for entry in find_entries(cache_folder()) if entry.age_seconds > limit])


def _remove(entries: list[Entry]) -> None:
    """Remove entries and print the freed bytes. Raises CacheError if some are in use."""
    from gemma_runtime.machine import format_bytes

    sizes = {entry.key: entry.bytes for entry in entries}
    gone = [entry for entry in entries if remove_entry(entry)]
    freed = format_bytes(sum(sizes[entry.key] for entry in gone))
    print(f"removed {len(gone)} entries, {freed}")
    if used := [entry.key[:_SHOWN] for entry in entries if entry not in gone]:
        raise CacheError(f"{', '.join(used)} not removed: in use by a running gemma-export; wait")


def _named(entries: list[Entry], key: str) -> Entry:
    matches = [entry for entry in entries if entry.key.startswith(key)]
    if len(matches) != 1:
        raise CacheError(
            f"{len(matches)} cache entries start with {key!r}, expected one; "
            "run gemma-export cache list to see the keys"
        )
    return matches[0]


def _seconds(text: str) -> float:
    count, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not count.isdecimal():
        raise typer.BadParameter(f"{text!r} is not an age; write it like 12h, 30d or 8w")
    return int(count) * _UNITS[unit]


def _age(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    unit = "d" if seconds >= 86400 else "h"
    return f"{seconds / _UNITS[unit]:.0f} {unit}"
