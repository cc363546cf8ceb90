"""Folders of Gemma 1: names of its activation and of a norm, and chats without a system turn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.progress import QuietReporter
from gemma_export.sidecars.chat_format import chat_format
from gemma_export.sidecars.text import WantedText, read_text
from gemma_runtime.errors import ConfigError
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.tokenizer import Tokenizer
from tests.export.models import GEMMA1, eager_logits, save_tiny
from tests.field.folders import (
    PROMPT,
    change,
    check_same,
    configure,
    our_logits,
    transformers_logits,
)
from tests.runtime.conftest import small_tokenizer

# After the documented turns of Gemma 1 and 2; written for this test.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(GEMMA1, tmp_path / "gemma1")
    return tmp_path / "gemma1"


@pytest.mark.parametrize("fields", [{"hidden_activation": None}, {}], ids=["null", "missing"])
def test_gelu_means_its_tanh_form(folder: Path, fields: dict[str, None]) -> None:
    """The first files say gelu. transformers 5 takes that literally, transformers 4 didn't."""
    expected = transformers_logits(folder)
    configure(folder, hidden_act="gelu", **fields)
    check_same(open_folder(folder), expected)


def test_another_activation_is_refused(folder: Path) -> None:
    configure(folder, hidden_act="gelu", hidden_activation="relu")
    with pytest.raises(
        ConfigError, match="hidden_activation is 'relu', expected gelu_pytorch_tanh"
    ):
        open_folder(folder)


def test_fields_of_later_gemmas_have_no_effect_as_in_transformers(folder: Path) -> None:
    """Trainers write them all."""
    expected = transformers_logits(folder)
    configure(
        folder,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
        sliding_window=4,
    )
    check_same(open_folder(folder), expected)


@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_names_with_another_beginning_are_read(folder: Path, prefix: str) -> None:
    expected = transformers_logits(folder)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    change(folder, rename)
    checkpoint = open_folder(folder)
    check_same(checkpoint, expected)
    assert checkpoint.notes == ()


def test_an_adapter_replaces_the_norm_before_the_mlp_by_its_name(
    folder: Path, tmp_path: Path
) -> None:
    model = GEMMA1.model.from_pretrained(folder, attn_implementation="eager")
    saved = ["post_attention_layernorm"]
    lora = LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=saved,
                      init_lora_weights=False)  # fmt: skip
    trained = get_peft_model(model, lora)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    trained.save_pretrained(str(tmp_path / "adapter"))
    merged: Any = trained.merge_and_unload()
    merged.train(False)
    checkpoint = open_checkpoint(str(tmp_path / "adapter"), base=str(folder))
    assert (our_logits(checkpoint) - eager_logits(merged, PROMPT)).abs().max() < 1e-4


def test_a_system_text_goes_in_front_of_the_first_turn_of_the_user(tmp_path: Path) -> None:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    turns = [Message("system", "the thing"), Message("user", "sing"), Message("assistant", "in")]
    folded = [Message("user", "the thing\n\nsing"), turns[2]]
    last = Message("user", "x")
    one, other = (
        encode_chat(tokenizer, TEMPLATE, [*messages, last], 2) for messages in (turns, folded)
    )
    assert one == other
    phones = chat_format(TEMPLATE, "<bos>", "<eos>")
    assert phones.render([("system", "S"), ("user", "U")]) == (
        "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_reply_ends_at_the_end_of_its_turn(folder: Path) -> None:
    """Gemma 1's config and generation_config.json name <eos> alone."""
    tokenizer = small_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    configure(folder, eos_token_id=1, vocab_size=96)
    text = read_text(open_folder(folder), 64, [], WantedText(), QuietReporter())
    assert text.stop_tokens == (1, tokenizer.token_to_id("<end_of_turn>"))
