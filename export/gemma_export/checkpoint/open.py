"""Opens the checkpoint that the user named."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.adapter_fit import fit_adapter, merged_config
from gemma_export.checkpoint.adapter_folder import (
    ADAPTER_CONFIG,
    Adapter,
    is_adapter,
    open_adapter,
    split_weight,
)
from gemma_export.formats.downloaded import check_downloaded
from gemma_export.model.config import GemmaConfig
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.sizes import OFFICIAL, Official, find_official
from gemma_runtime.errors import CheckpointError, ConfigError, MissingExtra
from gemma_runtime.hub import HubName, looks_like_hub_id, parse_hub_name

DEMO = "demo"
# What `--checkpoint` may be. The documentation's table is made from it.
ADDRESSES: Mapping[str, str] = {
    "`FOLDER`": "a folder with `config.json` and safetensors, with one GGUF model, or with an "
    "adapter",
    "`FILE.gguf`": "a GGUF file; of a split model (`NAME-00001-of-00003.gguf`) any part, with the "
    "others beside it",
    "`~/.ollama/models/blobs/sha256-…`": "a model of Ollama, known as GGUF by its first bytes",
    "`OWNER/NAME`": "a repository of the hub with one of these; `--revision` chooses a branch, tag "
    "or commit",
    "`https://huggingface.co/OWNER/NAME/tree/REVISION`": "the same, as a browser shows it",
    "`OWNER/NAME:PATTERN`": "one GGUF model of a repository: its name, a part of it such as "
    "`Q4_0`, or wildcards",
    "`random[:SEED]`": "random weights; `--size` or `--config` gives their shape",
    "`demo`": "the Gemma 3 270M of the extra `demo`",
}


def open_checkpoint(
    source: str | None,
    size: str | None = None,
    family: str | None = None,
    config_file: Path | None = None,
    base: str | None = None,
    adapters: Sequence[str] = (),
    revision: str | None = None,
) -> Checkpoint:
    """Open a folder, a `.gguf` file, `random[:SEED]`, `demo`, a hub id or URL; merge `adapters`.

    `source=None` selects the official checkpoint of `size`. Random weights take their shape from
    `size` or `config_file`. A `source` that is an adapter is merged into `base`, or else into the
    model that its config names. `revision` is the branch, tag or commit of `source` on the hub.
    """
    model = _find_model(source, base, adapters, revision)
    checkpoint = _open_model(model.source, model.revision, size, family, config_file)
    if not model.adapters:
        return checkpoint
    with _packages():
        from gemma_export.checkpoint.adapter import merge_adapters

        return merge_adapters(checkpoint, model.adapters)


def _open_model(
    source: str | None,
    revision: str | None,
    size: str | None,
    family: str | None,
    config_file: Path | None,
) -> Checkpoint:
    official = find_official(size, family) if size else None
    if source is not None and is_random(source):
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
            checkpoint = _from_hub(source or (official.hub_id if official else ""), revision)
    _check_size(checkpoint, official)
    return checkpoint


def planned_config(
    source: str | None,
    size: str | None = None,
    family: str | None = None,
    config_file: Path | None = None,
    base: str | None = None,
    adapters: Sequence[str] = (),
    revision: str | None = None,
) -> GemmaConfig:
    """The config only. Opens no weights of an official model, and none of random ones.

    Raises CheckpointError for an adapter that doesn't fit.
    """
    model = _find_model(source, base, adapters, revision)
    config = _model_config(model, size, family, config_file)
    changed = [name for one in model.adapters for name in fit_adapter(one, config)[0]]
    return merged_config(config, changed)


def may_be_opened(
    source: str | None, base: str | None, adapters: Sequence[str], revision: str | None
) -> bool:
    """Whether a plan may open the checkpoint, as `planned_config` then does anyway.

    Not an official model, random weights, or a model of the hub below an adapter.
    """
    model = _find_model(source, base, adapters, revision)
    if model.source is None or is_random(model.source):
        return False
    is_here = model.source == DEMO or Path(model.source).expanduser().exists()
    return is_here or not model.adapters


def _model_config(
    model: "_Model", size: str | None, family: str | None, config_file: Path | None
) -> GemmaConfig:
    official = find_official(size, family) if size else None
    source = model.source
    if source is None and official is not None and config_file is None:
        return official.config
    if source is not None and is_random(source):
        return _random_shape(source, official, config_file)[0]
    if model.adapters and size is None and config_file is None:
        for known in OFFICIAL:
            if known.hub_id == source:
                return known.config
    return _open_model(source, model.revision, size, family, config_file).config


@dataclass(frozen=True, slots=True)
class _Model:
    """What `--checkpoint`, `--base` and `--adapter` name together."""

    source: str | None  # never an adapter
    revision: str | None
    adapters: tuple[Adapter, ...]


def _find_model(
    source: str | None, base: str | None, adapters: Sequence[str], revision: str | None
) -> _Model:
    """Open the adapters, and find the model that they are merged into."""
    if revision is not None and source is not None:
        _check_on_hub(source)
    merged = tuple(_open_adapter(*split_weight(text)) for text in adapters)
    folder = _adapter_folder(source, revision) if source is not None else None
    if source is None or folder is None:
        if base is not None:
            raise CheckpointError(
                f"--base {base} needs an adapter as --checkpoint, which {source or 'missing'} is "
                "not; give the model as --checkpoint and adapters as --adapter"
            )
        return _Model(source, revision, merged)
    adapter = open_adapter(folder, _adapter_name(source))
    own = None if base else _own_model(folder)
    found = own or base or _named_base(adapter)
    if own is None and _adapter_folder(found) is not None:
        raise CheckpointError(
            f"the base of {source}, {found}, is an adapter too; give the model as --checkpoint and "
            "both adapters as --adapter"
        )
    own_revision = adapter.config.get("revision") if found == adapter.base else None
    return _Model(found, own_revision, (adapter, *merged))


def _check_on_hub(source: str) -> None:
    if source == DEMO or is_random(source) or Path(source).expanduser().exists():
        raise CheckpointError(
            f"{source} is not on the hub, so it has no --revision; leave --revision out"
        )


def _open_adapter(source: str, weight: float) -> Adapter:
    folder = _adapter_folder(source)
    if folder is None:
        raise CheckpointError(
            f"--adapter {source} is not an adapter; expected a folder or hub id with "
            f"{ADAPTER_CONFIG}, or FOLDER=WEIGHT"
        )
    return open_adapter(folder, _adapter_name(source), weight)


def _adapter_name(source: str) -> str:
    return Path(source).expanduser().resolve().name


def _adapter_folder(source: str, revision: str | None = None) -> Path | None:
    """The folder of an adapter, downloaded if it is on the hub; None if it is something else."""
    path = Path(source).expanduser()
    if not path.exists() and not is_random(source):
        from gemma_export.checkpoint.hub import fetch_hub

        name, pattern = _hub_name(source, revision)
        if name is None or pattern or any(known.hub_id == name.repo_id for known in OFFICIAL):
            return None
        path = fetch_hub(name.repo_id, name.revision).folder
    return path if is_adapter(path) else None


def _own_model(folder: Path) -> str | None:
    """The folder itself if it holds a model too; transformers reads that one, not the base."""
    names = ("model.safetensors", "model.safetensors.index.json")
    has_weights = any((folder / name).exists() for name in names)
    return str(folder) if has_weights and (folder / "config.json").exists() else None


def _named_base(adapter: Adapter) -> str:
    path, base = adapter.folder / ADAPTER_CONFIG, adapter.base
    if base is None:
        raise CheckpointError(f"{path} names no base model; give it as --base FOLDER or hub id")
    if not Path(base).expanduser().exists() and not looks_like_hub_id(base):
        raise CheckpointError(
            f"{path} names the base {base}, which does not exist here; give it as --base FOLDER "
            "or hub id"
        )
    return base


@contextmanager
def _packages() -> Iterator[None]:
    """Raise MissingExtra if torch, or for GGUF files the gguf package, is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or "torch").partition(".")[0], "export") from error


def is_random(source: str) -> bool:
    """Whether `--checkpoint` asks for random weights."""
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
    except (OSError, RecursionError, ValueError) as error:
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
    check_downloaded(path)
    if path.exists() and (model := _gguf_file(path)) is not None:
        from gemma_export.checkpoint.gguf import open_gguf

        return open_gguf(model)
    if path.is_dir():
        from gemma_export.checkpoint.folder import open_folder

        return open_folder(path)
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"{path} is one file of a checkpoint; give its folder, {path.parent}")
    if path.exists():
        raise CheckpointError(
            f"{path} is neither a folder with safetensors nor a .gguf file; pickles (.bin, .pt) "
            "are refused, because reading one can run code"
        )
    return None


def _gguf_file(path: Path) -> Path | None:
    """The GGUF model that a path is, or that its folder contains."""
    from gemma_export.checkpoint.gguf_choice import find_gguf, is_gguf

    if path.is_dir():
        return find_gguf(path)
    return path if is_gguf(path) else None


def _from_hub(source: str, revision: str | None) -> Checkpoint:
    """Open `owner/name`, or `owner/name:PATTERN` for one of its GGUF models."""
    from gemma_export.checkpoint.folder import open_folder
    from gemma_export.checkpoint.hub import fetch_hub

    name, pattern = _hub_name(source, revision)
    if name is None:
        raise CheckpointError(
            f"{source} does not exist, and is not a hub id (owner/name); expected a folder, a "
            ".gguf file, a hub id, random[:SEED] or demo"
        )
    snapshot = fetch_hub(name.repo_id, name.revision, pattern)
    if snapshot.gguf is not None:
        from gemma_export.checkpoint.gguf import open_gguf

        opened = open_gguf(snapshot.folder / snapshot.gguf)
        return replace(opened, id=f"{name.repo_id}/{snapshot.gguf}", revision=snapshot.revision)
    return open_folder(snapshot.folder, name.repo_id, snapshot.revision)


def _hub_name(source: str, revision: str | None) -> tuple[HubName | None, str]:
    """Read a hub id or URL, and the `:PATTERN` after it. `revision` is the one of --revision."""
    scheme, slashes, rest = source.rpartition("://")
    text, _, pattern = rest.partition(":")
    name = parse_hub_name(f"{scheme}{slashes}{text}")
    if name is None or revision is None:
        return name, pattern
    if name.revision not in (None, revision):
        raise CheckpointError(
            f"--revision is {revision}, but {source} names {name.revision}; give one of them"
        )
    return HubName(name.repo_id, revision), pattern


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
