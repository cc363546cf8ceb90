"""What a reader of untrusted bytes is made of, for the fuzzer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.judge import Read

TINY = Path(__file__).parent.parent / "data" / "tiny"
CORPUS = Path(__file__).with_name("corpus")


@dataclass(frozen=True, slots=True)
class Reader:
    """`open` gets an empty folder of its own. Seeds are valid inputs: files and texts."""

    open: Callable[[Path], Read]
    seeds: Sequence[Path | str | bytes] = ()  # besides those in the reader's folder of the corpus
    packages: tuple[str, ...] = ()  # that it needs besides those of the tests
    tried: int = 300  # damaged inputs in the tests

    def inputs(self, name: str) -> list[bytes]:
        """Seeds, and inputs that once were findings."""
        files = sorted((CORPUS / name).glob("*"))
        return [_content(seed) for seed in (*self.seeds, *files)]


def _content(seed: Path | str | bytes) -> bytes:
    if isinstance(seed, Path):
        return seed.read_bytes()
    return seed.encode() if isinstance(seed, str) else seed


def as_file(name: str, read: Callable[[Path], object]) -> Callable[[Path], Read]:
    """A reader of one file of this name."""

    def opened(folder: Path) -> Read:
        def take(data: bytes) -> object:
            (folder / name).write_bytes(data)
            return read(folder / name)

        return take

    return opened


def as_text(read: Callable[[str], object]) -> Callable[[Path], Read]:
    """A reader of text. Bytes that are not UTF-8 reach it as other characters."""
    return lambda folder: lambda data: read(data.decode("utf-8", "replace"))
