"""Gemma 4's folders as their authors save them: multimodal, with its own turns and thoughts."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.cli import run as export
from gemma_export.progress import QuietReporter
from gemma_export.sidecars.text import WantedText, read_text
from gemma_runtime.cli import run_command as run
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.tokenizer import load_tokenizer
from tests.export.conftest import export_folder
from tests.export.models import E2B, eager_logits, save_tiny
from tests.field.folders import (
    PROMPT,
    change,
    check_same,
    config_of,
    configure,
    our_logits,
    transformers_logits,
)
from tests.runtime.conftest import gemma4_tokenizer

TEMPLATE = """\
{{ bos_token }}{% if enable_thinking %}{{ '<|turn>system\n<|think|>\n<turn|>\n' }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<|turn>' + role + '\n' + m.content | trim + '<turn|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(E2B, tmp_path)
    return tmp_path


def wrap(folder: Path) -> None:
    """Make the folder multimodal, with a tower that has a Gemma layer's norms."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        for tower in ("vision_tower.encoder", "audio_tower"):
            norm = f"model.{tower}.layers.0.pre_feedforward_layernorm.weight"
            tensors[norm] = torch.zeros(4)
        tensors["model.embed_vision.embedding_projection.weight"] = torch.zeros(2, 2)

    text = {**config_of(folder), "use_bidirectional_attention": "vision"}
    configure(
        folder,
        model_type="gemma4",
        text_config=text,
        architectures=["Gemma4ForConditionalGeneration"],
    )
    change(folder, rename)


def test_the_text_model_of_a_multimodal_folder_is_read(folder: Path) -> None:
    expected = transformers_logits(folder)
    wrap(folder)
    checkpoint = open_folder(folder)
    check_same(checkpoint, expected)
    assert checkpoint.notes[0].endswith("without its 3 tensors for images or sound")


def test_keys_and_values_of_layers_that_share_caches_are_left_out(folder: Path) -> None:
    """Official files hold them; transformers ignores them too."""
    expected = transformers_logits(folder)
    own = "model.layers.7.self_attn"
    change(
        folder,
        lambda t: t.update(
            {f"{own}.{name}_proj.weight": torch.zeros(32, 128) for name in ("k", "v")}
        ),
    )
    checkpoint = open_folder(folder)
    check_same(checkpoint, expected)
    assert "2 tensors that a causal Gemma does not use" in checkpoint.notes[0]


def test_an_adapter_is_merged_as_peft_merges_it(folder: Path, tmp_path: Path) -> None:
    """Also norms that it replaces: PEFT saves their gains, as the model does."""
    model = E2B.model.from_pretrained(folder, attn_implementation="eager")
    targets = ["q_proj", "down_proj", "per_layer_projection", "per_layer_model_projection"]
    saved = ["post_attention_layernorm"]
    lora = LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    trained = get_peft_model(model, lora)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(1 + 0.2 * torch.randn_like(weight))
    trained.save_pretrained(str(tmp_path / "adapter"))
    merged: Any = trained.merge_and_unload()
    merged.train(False)
    checkpoint = open_checkpoint(str(tmp_path / "adapter"), base=str(folder))
    assert (our_logits(checkpoint) - eager_logits(merged, PROMPT)).abs().max() < 1e-4


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a template and generation_config.json, as official ones have."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = gemma4_tokenizer()
    config = copy.deepcopy(E2B.config)
    config.vocab_size = config.vocab_size_per_layer_input = tokenizer.get_vocab_size()
    save_tiny(replace(E2B, config=config), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ends = {"eos_token_id": [1, 5, 8], "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def test_stop_tokens_come_from_the_generation_config(chatty: Path) -> None:
    text = read_text(open_folder(chatty), 64, [], WantedText(), QuietReporter())
    assert set(text.stop_tokens) == {1, 5, 8}


def test_a_folder_without_a_template_gets_the_turns_of_its_vocabulary(
    chatty: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chatty, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    bundle = export_folder(folder, "int8", tmp_path / "bundle", context=64)
    turns = [
        Message("system", "s"),
        Message("user", "u"),
        Message("assistant", "a"),
        Message("user", "v"),
    ]
    tokenizer = load_tokenizer(bundle)
    manifest = bundle.manifest
    ids = encode_chat(tokenizer, manifest.chat_template, turns, manifest.bos_token)
    assert tokenizer.decode(ids, control=True) == (
        "<bos><|turn>system\ns<turn|>\n<|turn>user\nu<turn|>\n<|turn>model\na<turn|>\n"
        "<|turn>user\nv<turn|>\n<|turn>model\n"
    )
    assert tokenizer.token_id("<turn|>") in manifest.stop_tokens


def test_the_commands_work_on_a_bundle(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the thing that using users is in the user\n" * 6)
    output = str(tmp_path / "bundle")
    flags = ["--checkpoint", str(chatty), "--quant", "int4", "--context", "128"]
    assert export(["--target", "onnx", *flags, "--output", output, "--eval-text", str(text)]) == 0
    assert run(["verify", output]) == 0
    assert "PASS" in capsys.readouterr().out
    assert run(["eval", output, "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run(["run", output, "the user", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert run(["inspect", output]) == 0
    shown = capsys.readouterr().out
    assert "3 more layers read the cache of layer 2" in shown
    assert "1 more layers read the cache of layer 3" in shown
    assert "per-layer.onnx.data" in shown
