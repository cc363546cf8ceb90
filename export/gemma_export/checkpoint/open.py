"""Opens the checkpoint that the user named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_export.checkpoint import Checkpoint
from gemma_export.model.config import GemmaConfig, config_from_hf
from gemma_export.model.sizes import Official, find_official
from gemma_runtime.errors import CheckpointError, ConfigError, MissingExtra
from gemma_runtime.hub import parse_hub_name

DEMO = "demo"


def open_checkpoint(
    source: str | None,
    size: str | None = None,
    family: str | None = None,
    config_file: Path | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Open a folder, a `.gguf` file, `random[:SEED]`, `demo`, or a hub id or URL.

    `source=None` selects the official checkpoint of `size`. Random weights take their shape from
    `size` or `config_file`. `revision` is a branch, tag or commit on the hub.
    """
    official = find_official(size, family) if size else None
    if revision is not None and source is not None and (_is_random(source) or source == DEMO):
        raise CheckpointError(_not_on_hub(source))
    if source is not None and _is_random(source):
        config, seed = _random_shape(source, official, config_file)
        with _packages():
            from gemma_export.checkpoint.random import RandomCheckpoint

            return RandomCheckpoint(config, seed)
    if config_file is not None:
        raise CheckpointError("--config works only with --checkpoint random; leave it out")
    if source is None and official is None:
        raise CheckpointError("no checkpoint: give --size, e.g. 2b, or --checkpoint")
    with _packages():
        if source == DEMO:
            return _demo()
        checkpoint = _existing(source) if source is not None else None
        if checkpoint is None:
            hub_id = source or (official.hub_id if official else "")
            checkpoint = _from_hub(hub_id, revision)
        elif revision is not None:
            raise CheckpointError(_not_on_hub(checkpoint.id))
    _check_size(checkpoint, official)
    return checkpoint


def planned_config(
    source: str | None,
    size: str | None = None,
    family: str | None = None,
    config_file: Path | None = None,
    revision: str | None = None,
) -> GemmaConfig:
    """The config only. Opens nothing for an official size or for random weights."""
    official = find_official(size, family) if size else None
    if source is None and official is not None and config_file is None:
        return official.config
    if source is not None and _is_random(source):
        return _random_shape(source, official, config_file)[0]
    return open_checkpoint(source, size, family, config_file, revision).config


@contextmanager
def _packages() -> Iterator[None]:
    """Raise MissingExtra if torch, or for GGUF files the gguf package, is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or "torch").partition(".")[0], "export") from error


def _is_random(source: str) -> bool:
    return source.partition(":")[0] == "random"


def _random_shape(
    source: str, official: Official | None, config_file: Path | None
) -> tuple[GemmaConfig, int]:
    """The config and the seed of random weights."""
    seed = source.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise CheckpointError(f"seed {seed!r} is not a number; write e.g. random:7")
    if (official is None) == (config_file is None):
        raise CheckpointError("random weights need a shape; give either --size or --config FILE")
    if official is not None:
        return official.config, int(seed)
    assert config_file is not None
    try:
        config = json.loads(config_file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {config_file}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{config_file} is not a JSON object")
    return config_from_hf(config), int(seed)


def _demo() -> Checkpoint:
    from gemma_export.checkpoint.gguf import open_gguf
    from gemma_export.checkpoint.packaged import DEMO_NOTE, find_demo_gguf

    return open_gguf(find_demo_gguf(), (DEMO_NOTE,))


def _existing(source: str) -> Checkpoint | None:
    """Open a local file or folder; None if there is none of that name."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from gemma_export.checkpoint.gguf import open_gguf

        return open_gguf(path)
    if path.is_dir():
        from gemma_export.checkpoint.folder import open_folder

        return open_folder(path)
    if path.exists():
        raise CheckpointError(
            f"{path} is neither a folder with safetensors nor a .gguf file; pickles (.bin, .pt) "
            "are refused, because reading one can run code"
        )
    return None


def _not_on_hub(source: str) -> str:
    return f"{source} is not on the hub, so it has no --revision; leave --revision out"


def _from_hub(source: str, revision: str | None) -> Checkpoint:
    from gemma_export.checkpoint.folder import open_folder
    from gemma_export.checkpoint.hub import fetch_hub

    name = parse_hub_name(source)
    if name is None:
        raise CheckpointError(
            f"{source} does not exist, and is not a hub id (owner/name); expected a folder, a "
            ".gguf file, a hub id, random[:SEED] or demo"
        )
    if revision and name.revision and revision != name.revision:
        raise CheckpointError(
            f"--revision is {revision}, but {source} names {name.revision}; give one of them"
        )
    snapshot = fetch_hub(name.repo_id, revision or name.revision)
    return open_folder(snapshot.folder, name.repo_id, snapshot.revision)


def _check_size(checkpoint: Checkpoint, official: Official | None) -> None:
    """Raise CheckpointError if `--size` doesn't match `--checkpoint`."""
    if official is None:
        return
    want, have = official.config, checkpoint.config
    if (want.hidden_size, len(want.kinds)) != (have.hidden_size, len(have.kinds)):
        raise CheckpointError(
            f"{checkpoint.id} has {len(have.kinds)} layers of width {have.hidden_size}; "
            f"{official.family} {official.size} has {len(want.kinds)} of {want.hidden_size}; "
            "leave --size out or give the right one"
        )
