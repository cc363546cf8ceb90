"""What is read of a sentence-transformers folder, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gemma_export.checkpoint.folder import open_folder
from gemma_export.model.sizes import OFFICIAL_ENCODERS, find_official
from gemma_runtime.errors import CheckpointError, ConfigError
from tests.export.embedding.conftest import export
from tests.export.embedding.encoders import EMBEDDING_GEMMA_2, QUERY, their_vector

Change = Callable[[Path], object]


def _json(name: str, edit: Callable[[Any], Any]) -> Change:
    """Changes a JSON file of the folder."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))

    return change


def _bias(folder: Path) -> None:
    path = folder / "2_Dense" / "model.safetensors"
    weight = load_file(path)["linear.weight"]
    save_file({"linear.weight": weight, "linear.bias": weight[0].clone()}, path)


def _narrow(folder: Path) -> None:
    path = folder / "3_Dense" / "model.safetensors"
    save_file({"linear.weight": load_file(path)["linear.weight"][:, :32].clone()}, path)


POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
REFUSED: Mapping[str, tuple[Change, str]] = {
    "no modules": (lambda f: (f / "modules.json").unlink(), "encoder without modules.json"),
    "no pooling": (_json("modules.json", lambda m: [m[0], *m[2:]]), "expected Transformer, Pool"),
    "no unit length": (_json("modules.json", lambda m: m[:-1]), "and Normalize"),
    "another module": (
        _json("modules.json", lambda m: [*m[:2], {**m[2], "type": "x.LayerNorm"}, m[-1]]),
        "a module LayerNorm; expected only Dense",
    ),
    "outside": (
        _json("modules.json", lambda m: [*m[:2], {**m[2], "path": "../2_Dense"}, m[-1]]),
        "names '../2_Dense', outside the folder",
    ),
    "model elsewhere": (
        _json("modules.json", lambda m: [{**m[0], "path": "0_Transformer"}, *m[1:]]),
        "expected the folder itself",
    ),
    "not modules": (_json("modules.json", lambda m: {"a": m}), "can't read"),
    "cls": (
        _json(POOLING, lambda c: {**c, "pooling_mode_cls_token": True}),
        "expected the mean of all tokens",
    ),
    "last": (_json(POOLING, lambda c: {"pooling_mode": "lasttoken"}), "pooling is 'lasttoken'"),
    "without prompt": (_json(POOLING, lambda c: {**c, "include_prompt": False}), "include_prompt"),
    "activation": (_json(DENSE, lambda c: {**c, "activation_function": "x.Tanh"}), "'x.Tanh'"),
    "a bias": (_json(DENSE, lambda c: {**c, "bias": True}), "bias is True"),
    "bias in the file": (_bias, "expected one matrix"),
    "dense missing": (lambda f: (f / "2_Dense" / "model.safetensors").unlink(), "is missing"),
    "another width": (_narrow, r"dense.1.weight has shape \(64, 32\), the config says \(64, 256\)"),
    "length": (_json("sentence_bert_config.json", lambda c: {"max_seq_length": "x"}), "above 0"),
    "default prompt": (
        _json("config_sentence_transformers.json", lambda c: {**c, "default_prompt_name": "x"}),
        "none of its prompts",
    ),
    "no tokenizer.json": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "tokenizer.model without tokenizer.json",
    ),
    "another class": (
        _json("config.json", lambda c: {**c, "architectures": ["Gemma3ForCausalLM"]}),
        "expected an encoder: Gemma3TextModel",
    ),
}


@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_embedding_gemma_is_refused_by_name(
    folder: Path, change: Change, match: str
) -> None:
    change(folder)
    with pytest.raises((CheckpointError, ConfigError), match=match) as error:
        open_folder(folder)
    assert len(str(error.value).splitlines()) == 1


def test_new_spellings_of_modules_are_read(folder: Path) -> None:
    """sentence-transformers 6 has other packages, and one field for the pooling."""
    _json("modules.json", lambda m: [{**m[0], "type": "s.base.modules.x.Transformer"}, *m[1:]])(
        folder
    )
    _json(POOLING, lambda _: {"embedding_dimension": 128, "pooling_mode": "mean"})(folder)
    assert open_folder(folder).config.dense == (256, 64)


def test_prompts_and_lengths_are_optional(folder: Path, tmp_path: Path) -> None:
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    manifest = export(folder, "int8", tmp_path / "made").manifest
    assert (manifest.prompts, manifest.default_prompt) == ({}, None)
    assert manifest.context_length == 256  # the model's own


def test_a_default_prompt_is_kept(folder: Path, tmp_path: Path) -> None:
    from gemma_runtime.embedding.embedder import open_embedder

    name, default = "config_sentence_transformers.json", {"default_prompt_name": "query"}
    _json(name, lambda content: {**content, **default})(folder)
    with open_embedder(export(folder, "int8", tmp_path / "made")) as embedder:
        assert embedder.encode("in") == embedder.encode("in", "query")
        assert len(embedder.encode("in")) > len(QUERY) // 2


def test_a_folder_without_dense_modules_gives_its_mean(folder: Path, tmp_path: Path) -> None:
    from gemma_runtime.embedding.embedder import open_embedder

    _json("modules.json", lambda m: [*m[:2], m[-1]])(folder)
    for path in folder.glob("*_Dense/model.safetensors"):
        path.unlink()
    tokens = [2, 300, 40, 1]
    with open_embedder(export(folder, "none", tmp_path / "made")) as embedder:
        assert embedder.dimensions == 128
        assert abs(embedder.run(tokens) - their_vector(folder, tokens).numpy()).max() < 1e-6


def test_a_multimodal_folder_gives_its_text_model(tmp_path: Path) -> None:
    """As google/embeddinggemma-2 is: towers beside the text, and its config inside."""
    folder = EMBEDDING_GEMMA_2.save(tmp_path / "model")
    alone = export(folder, "none", tmp_path / "alone")
    weights = load_file(folder / "model.safetensors")
    text = {f"language_model.{name}": value for name, value in weights.items()}
    tower = {"vision_tower.layers.0.weight": weights["norm.weight"].clone()}
    save_file(text | tower, folder / "model.safetensors")
    _json(
        "config.json",
        lambda c: {
            "model_type": "embedding_gemma2",
            "architectures": ["EmbeddingGemma2Model"],
            "text_config": {k: v for k, v in c.items() if k != "architectures"},
        },
    )(folder)
    checkpoint = open_folder(folder)
    assert any("1 tensor for images or sound" in note for note in checkpoint.notes)
    both = export(folder, "none", tmp_path / "both").manifest
    assert both.quantization.codes_digest == alone.manifest.quantization.codes_digest


def test_official_sizes_have_the_parameters_of_their_cards() -> None:
    counts = {one.family: round(one.config.parameters / 1e6) for one in OFFICIAL_ENCODERS}
    assert counts == {"embeddinggemma": 308, "embeddinggemma2": 271}
    assert find_official("300m").hub_id == "google/embeddinggemma-300m"
    assert find_official("270m").family == "gemma3"
    second = find_official("270m", "embeddinggemma2")
    assert second.hub_id == "google/embeddinggemma-2"
    assert (second.config.dimensions, find_official("300m").config.dimensions) == (768, 768)
    windows = [find_official("300m").config.sliding_window, second.config.sliding_window]
    assert windows == [257, 513]  # transformers' configuration_gemma3.py; its radius, plus itself
