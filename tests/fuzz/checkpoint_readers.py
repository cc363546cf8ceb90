"""Readers of checkpoints: weights, configs, tokenizers, adapters, recipes."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from gemma_export.checkpoint.adapter_fit import fit_adapter
from gemma_export.checkpoint.adapter_folder import open_adapter
from gemma_export.checkpoint.folder import FolderCheckpoint, open_folder
from gemma_export.checkpoint.gguf import GgufCheckpoint, open_gguf
from gemma_export.checkpoint.hub import _has_weights
from gemma_export.checkpoint.open import planned_config
from gemma_export.checkpoint.sentence_folder import read_encoder
from gemma_export.checkpoint.sentencepiece import tokenizer_from_sentencepiece
from gemma_export.checkpoint.tokenizer_folder import read_tokenizer
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.hf_config import config_from_hf
from gemma_export.progress import QuietReporter
from gemma_export.push_command import _read_benchmark
from gemma_export.quantize.recipe import load_recipe
from gemma_export.search.question import ask
from gemma_export.sidecars.phone_files import phone_files
from gemma_export.sidecars.text import load_encoder, without_training_state
from gemma_runtime.bundle import open_bundle
from gemma_runtime.text.tokenizer import Tokenizer
from tests.fuzz.bundle_readers import REPORTS
from tests.fuzz.judge import Read
from tests.fuzz.make_corpus import (
    ADAPTER,
    CONFIG,
    QUANTIZED,
    adapter_weights,
    sentencepiece,
    weights,
    write_adapter,
    write_folder,
)
from tests.fuzz.reader import TINY, Reader, as_file


def _read_all(checkpoint: FolderCheckpoint | GgufCheckpoint) -> None:
    """A few rows of every weight, and its codes if it has some."""
    for name, shape in checkpoint.config.tensor_shapes().items():
        checkpoint.rows(name, 0, min(shape[0], 4))
        if len(shape) == 2 and checkpoint.stored(name).format is not None:
            checkpoint.codes(name, 0, min(shape[0], 4))


def _in_folder(changed: str, packed: str = "") -> Callable[[Path], Read]:
    """A checkpoint of which one file is the input."""

    def opened(folder: Path) -> Read:
        write_folder(folder, "")
        (folder / "model.safetensors").write_bytes(weights(packed))

        def take(data: bytes) -> None:
            (folder / changed).write_bytes(data)
            _has_weights(folder)
            _read_all(open_folder(folder))

        return take

    return opened


def _indexed(folder: Path) -> Read:
    read = _in_folder(_INDEX)(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    return read


def _packed(folder: Path) -> Read:
    """Weights that name their config in their metadata."""
    write_folder(folder, "")

    def take(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        config = SafetensorsFile(folder / "model.safetensors").metadata.get("config", "{}")
        (folder / "config.json").write_text(config, "utf-8", "replace")
        _read_all(open_folder(folder))

    return take


def _config(folder: Path) -> Read:
    """The config of weights whose quantization it names, or once named."""
    for kind in ("", *QUANTIZED):
        write_folder(folder / kind, kind)

    def take(data: bytes) -> None:
        kind = next((one for one in QUANTIZED if one.encode() in data), "")
        (folder / kind / "config.json").write_bytes(data)
        _read_all(open_folder(folder / kind))

    return take


def _gguf(path: Path) -> None:
    checkpoint = open_gguf(path)
    checkpoint.tokenizer()
    _read_all(checkpoint)


def _tokenizer(changed: str) -> Callable[[Path], Read]:
    """A folder's tokenizer of which one file is the input, up to what phones get."""

    def opened(folder: Path) -> Read:
        shutil.copy(TINY / "tokenizer.json", folder)

        def take(data: bytes) -> None:
            (folder / changed).write_bytes(data)
            files = without_training_state(read_tokenizer(folder, 500))
            assert files is not None
            load_encoder(checkpoint, files)
            phone_files(files, "<bos>", files.eos, QuietReporter())
            (folder / "own.json").write_bytes(files.tokenizer_json)
            ids = Tokenizer(folder / "own.json").encode("the <bos> text, é\n", control=True)
            Tokenizer(folder / "own.json").decode(ids)

        write_folder(folder / "model", "")
        checkpoint = open_folder(folder / "model")
        return take

    return opened


def _adapter(changed: str) -> Callable[[Path], Read]:
    config = config_from_hf(CONFIG)

    def opened(folder: Path) -> Read:
        write_adapter(folder)

        def take(data: bytes) -> None:
            (folder / changed).write_bytes(data)
            fit_adapter(open_adapter(folder), config)

        return take

    return opened


def _shape(path: Path) -> object:
    return planned_config("random", config_file=path)


_INDEX = "model.safetensors.index.json"
_NAMED = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
_SPECIAL = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": "{{ 1 }}"}
_ADDED = {"added_tokens_decoder": {"5": {"content": "<x>", "special": True}}}
_EXTRA = {"extra_special_tokens": {"image_token": "<image>"}, "chat_template": [
    {"name": "default", "template": "{{ bos_token }}"}, {"name": "tool_use", "template": "a"}
]}  # fmt: skip
_CONFIGS = [json.dumps({**CONFIG, **fields}) for fields in ({}, *QUANTIZED.values())]
_GPTQ = QUANTIZED["gptq"]["quantization_config"]
_RECIPE = "base: int4\nname: own\ntensors:\n  '*mlp*': {bits: 8, group: channel}\n"
_SEARCH = """\
checkpoints: [demo, {size: 2b}]
targets: [onnx, {target: hf, hf_format: [gptq, compressed-tensors]}]
recipes: [int4, {quant: int4-gptq, bits: [6, 7.5], group: 64}]
context: [512, 1024]
objectives: [weights_kl, size]
budget: {size: 1.3 GiB, minutes: 5}
"""


def _module(changed: str) -> Callable[[Path], Read]:
    """An encoder's folder of which one file is the input."""

    def opened(folder: Path) -> Read:
        for name, content in _ENCODER.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))

        def take(data: bytes) -> object:
            (folder / changed).write_bytes(data)
            return read_encoder(folder)

        return take

    return opened


_MODULES = [
    {"type": f"x.{name}", "path": path}
    for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
]
_ENCODER: Mapping[str, object] = {
    "modules.json": _MODULES,
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": True},
    "config_sentence_transformers.json": {"prompts": {"q": "a"}, "default_prompt_name": "q"},
    "sentence_bert_config.json": {"max_seq_length": 128},
}
CHECKPOINT_READERS: Mapping[str, Reader] = {
    "safetensors": Reader(_in_folder("model.safetensors"), [weights("")]),
    "packed weights": Reader(_packed, list(map(weights, QUANTIZED))),
    "gguf": Reader(as_file("m.gguf", _gguf)),
    "config": Reader(_config, _CONFIGS),
    "config alone": Reader(as_file("config.json", _shape), _CONFIGS[:1]),
    "generation config": Reader(
        _in_folder("generation_config.json"), ['{"eos_token_id": [1, 5], "top_k": 64, "top_p": 1}']
    ),
    "index": Reader(_indexed, [json.dumps(_NAMED)]),
    "quantize_config": Reader(_in_folder("quantize_config.json", "gptq"), [json.dumps(_GPTQ)]),
    "tokenizer": Reader(_tokenizer("tokenizer.json"), [TINY / "tokenizer.json"], tried=40),
    "tokenizer config": Reader(
        _tokenizer("tokenizer_config.json"),
        list(map(json.dumps, (_SPECIAL, _ADDED, _EXTRA))),
        tried=40,
    ),
    "special tokens": Reader(
        _tokenizer("special_tokens_map.json"), [json.dumps(_SPECIAL)], tried=40
    ),
    "added tokens": Reader(_tokenizer("added_tokens.json"), ['{"<a>": 3, "<b>": 499}'], tried=40),
    "sentencepiece": Reader(
        as_file("tokenizer.model", tokenizer_from_sentencepiece), [sentencepiece()]
    ),
    "adapter config": Reader(_adapter("adapter_config.json"), [json.dumps(ADAPTER)]),
    "adapter weights": Reader(_adapter("adapter_model.safetensors"), [adapter_weights()]),
    **{
        f"encoder {Path(name).name}": Reader(_module(name), [json.dumps(content)])
        for name, content in _ENCODER.items()
    },
    "recipe": Reader(as_file("r.yaml", load_recipe), [TINY / "recipe.yaml", _RECIPE]),
    "search": Reader(as_file("s.yaml", ask), [_SEARCH]),
    "benchmark": Reader(
        as_file("b.json", lambda path: _read_benchmark(path, open_bundle(TINY))),
        [REPORTS / "bench.json"],
    ),
}
