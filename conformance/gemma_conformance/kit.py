"""The kit: a folder with tiny checkpoints, and what the right model computes for each.

`kit.json` lists the checkpoints. `NAME/` is a checkpoint folder, `NAME.npy` its right logits,
(T, V) float32, made by transformers with eager attention.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from gemma_conformance.checkpoints import CHECKPOINTS, TinyCheckpoint, build, round_embedding_scales
from gemma_conformance.faults import logits
from gemma_conformance.tokenizer import MESSAGES, chat_tokens, save_tokenizer
from gemma_runtime.bundle import staged_folder
from gemma_runtime.errors import GemmaError, nearest_first
from gemma_runtime.formats.json_bytes import decode_json

SCHEMA = 1
_INDEX = "kit.json"
_PROMPT, _NEW = 20, 24  # tokens of the prompt for greedy tokens, and how many follow
_NEAR_TIE = 0.005  # greedy tokens end before two logits are this close


class KitError(GemmaError):
    """A folder is not a kit, or a checkpoint isn't in it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint with what the right model computes."""

    name: str
    family: str
    dtype: str
    about: str
    tokens: tuple[int, ...]
    prompt: int  # so many of the tokens are the prompt of the greedy ones
    greedy: tuple[int, ...]
    chat: tuple[int, ...]  # the tokens of MESSAGES


@dataclass(frozen=True, slots=True)
class Kit:
    folder: Path
    cases: tuple[Case, ...]
    made_with: dict[str, str]

    def checkpoint(self, case: Case) -> Path:
        return self.folder / case.name

    def expected(self, case: Case) -> NDArray[np.float32]:
        """The right logits, (T, V)."""
        array: NDArray[np.float32] = np.load(self.folder / f"{case.name}.npy")
        return array

    def reference(self, case: Case) -> Any:
        """The right transformers model, in float32."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.checkpoint(case), dtype=torch.float32, attn_implementation="eager"
        )
        model.train(False)
        with torch.no_grad():
            round_embedding_scales(model, getattr(torch, case.dtype))
        return model


class _Index(msgspec.Struct, forbid_unknown_fields=True):
    schema: int
    made_with: dict[str, str]
    cases: tuple[Case, ...]


def make_kit(folder: Path) -> Kit:
    """Write all checkpoints. Raises KitError if the folder exists and isn't empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KitError(f"{folder} exists already; give a new folder")
    with staged_folder(folder) as stage:
        cases = tuple(_write_case(checkpoint, stage) for checkpoint in CHECKPOINTS)
        made_with = {name: version(name) for name in ("torch", "transformers")}
        index = msgspec.json.encode(_Index(SCHEMA, made_with, cases))
        (stage / _INDEX).write_bytes(msgspec.json.format(index))
    return Kit(folder, cases, made_with)


def open_kit(folder: Path) -> Kit:
    """Raises KitError if the folder isn't a kit of this version."""
    path = folder / _INDEX
    advice = f"make one: gemma-conformance make {folder}"
    if not path.is_file():
        raise KitError(f"{folder} is not a kit: it has no {_INDEX}; {advice}")
    try:
        index = decode_json(path.read_bytes(), _Index)
    except msgspec.DecodeError as error:
        raise KitError(f"{path} can't be read: {error}; {advice}") from error
    if index.schema != SCHEMA:
        raise KitError(f"{path} has schema {index.schema}, expected {SCHEMA}; {advice}")
    return Kit(folder, index.cases, index.made_with)


def find_cases(kit: Kit, names: Sequence[str]) -> list[Case]:
    """Raises KitError for a name that the kit doesn't have."""
    known = {case.name: case for case in kit.cases}
    for name in names:
        if name not in known:
            raise KitError(f"no checkpoint {name!r}; choose from {nearest_first(name, known)}")
    return [known[name] for name in names]


def _write_case(checkpoint: TinyCheckpoint, folder: Path) -> Case:
    model, tokens = build(checkpoint), checkpoint.tokens()
    np.save(folder / f"{checkpoint.name}.npy", logits(model, tokens).numpy())
    greedy = _greedy(model, tokens[:_PROMPT])
    place = folder / checkpoint.name
    model.to(getattr(torch, checkpoint.dtype)).save_pretrained(place)
    save_tokenizer(place, checkpoint.turn)
    _write_as_published(place / "config.json", checkpoint)
    return Case(
        checkpoint.name,
        checkpoint.family,
        checkpoint.dtype,
        checkpoint.about,
        tuple(tokens),
        _PROMPT,
        tuple(greedy),
        tuple(chat_tokens(checkpoint.turn)),
    )


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    """The most probable next tokens, up to the first near tie."""
    tokens = list(prompt)
    for _ in range(_NEW):
        first, second = torch.topk(logits(model, tokens)[-1], 2).values.tolist()
        if first - second < _NEAR_TIE:
            break
        tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def _write_as_published(path: Path, checkpoint: TinyCheckpoint) -> None:
    """Name settings as published checkpoints do: rope of Gemma 2 and 3, heads of Gemma 4.

    transformers 5 nests them, which other readers don't know.
    """
    config = json.loads(path.read_text("utf-8"))
    if checkpoint.family != "gemma4":
        ropes = config.pop("rope_parameters")
        config["torch_dtype"] = config.pop("dtype")
        whole = ropes.get("full_attention", ropes)
        config["rope_theta"] = whole["rope_theta"]
        if "sliding_attention" in ropes:
            config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
            config["rope_scaling"] = {"rope_type": "linear", "factor": whole["factor"]}
            config["sliding_window_pattern"] = 6
    else:
        config.pop("per_layer_config", None)
        config.update(checkpoint.settings)
    path.write_text(json.dumps(config, indent=2), "utf-8")


def shown_messages() -> list[dict[str, str]]:
    return [dict(message) for message in MESSAGES]
