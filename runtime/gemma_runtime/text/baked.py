"""Baked prefixes: the beginning of prompts with its caches, in a file that sessions start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BakedError, TokenizerError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.session import Session
from gemma_runtime.snapshot import Snapshot
from gemma_runtime.snapshot_file import (
    Maker,
    check_maker,
    describe_maker,
    open_snapshot,
    write_snapshot,
)
from gemma_runtime.text.opening import Opening, check_examples
from gemma_runtime.text.shared_prefix import common_length
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import check_tools

_OPENING = "opening"
_PROBE = 8  # tokens that are fed after the prefix, for a check


@dataclass(frozen=True, slots=True)
class Baked:
    """An opening and its tokens' caches. `session.resume(baked.snapshot)` starts after it."""

    path: Path
    opening: Opening
    snapshot: Snapshot
    maker: Maker

    def check_begins(self, tokens: Sequence[int]) -> None:
        """Raise BakedError unless these tokens begin with the baked ones, and go on."""
        baked = self.snapshot.tokens
        same = common_length(baked, tokens)
        if same < len(baked):
            raise BakedError(
                f"the prompt is another from token {same + 1} on, of the {len(baked)} in "
                f"{self.path}; bake it again, or do without it"
            )
        if len(tokens) == len(baked):
            raise BakedError(f"the prompt ends with the {len(baked)} tokens of {self.path}")


@dataclass(frozen=True, slots=True)
class Baking:
    """What a baked prefix costs and saves."""

    file: str
    tokens: int
    bytes: int
    feed_seconds: float  # what every start without it takes
    resume_seconds: float  # what a start from it takes: reading, checking and copying


def bake(
    bundle: Bundle,
    session: Session,
    tokenizer: Tokenizer,
    opening: Opening,
    path: Path,
    force: bool = False,
) -> Baking:
    """Feed an opening to a session of the bundle, and write the file.

    The file is then read, and a few tokens after it must get the same logits, bit for bit. Raises
    BakedError if the file exists, unless `force` is set, and ContextFull if nothing more would fit.
    """
    if opening == Opening():
        raise BakedError("there is nothing to bake; give a text, a system turn, examples or tools")
    if path.exists() and not force:
        raise BakedError(f"{path} exists; give another file, or --force to replace it")
    tokens = opening.prefix(tokenizer, bundle.manifest)
    session.reset()
    started = perf_counter()
    session.prefill(tokens)
    fed = perf_counter()
    snapshot = session.save()
    probe = tokens[: max(1, min(_PROBE, session.context_length - session.position))]
    expected = session.prefill(probe)
    notes = {_OPENING: msgspec.json.encode(opening).decode()}
    write_snapshot(path, snapshot, describe_maker(bundle), notes, force)
    resuming = perf_counter()
    session.resume(open_baked(path, bundle).snapshot)
    resumed = perf_counter()
    if not np.array_equal(session.prefill(probe), expected):
        path.unlink()
        raise BakedError(f"{path} gave other logits than feeding its tokens; it is removed")
    size = path.stat().st_size
    return Baking(str(path), len(tokens), size, fed - started, resumed - resuming)


def open_baked(path: Path | str, bundle: Bundle) -> Baked:
    """Open a file of `bake`. Raises BakedError if it is broken, or not of this bundle made here."""
    baked = read_baked(Path(path))
    check_maker(baked.path, baked.maker, bundle)
    return baked


def read_baked(path: Path) -> Baked:
    """Open a file without asking whether it is of a bundle here. Raises BakedError."""
    stored = open_snapshot(path)
    try:
        opening = decode_json(stored.notes[_OPENING], Opening)
        check_tools(opening.tools)
        check_examples(opening.examples)
    except (KeyError, msgspec.DecodeError, TokenizerError) as error:
        raise BakedError(f"{path} doesn't say what was baked: {error}; bake it again") from error
    return Baked(path, opening, stored.snapshot, stored.maker)
