"""ShieldGemma: a Gemma 2 whose chat template needs a guideline. A bundle of it is a guard."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from gemma_runtime.bundle import Bundle
from gemma_runtime.text.guard import SHIELD_POLICIES, Guard
from tests.export.conftest import export_folder
from tests.runtime.text.test_guard import PROMPT_TEXT, REPLY_TEXT, X, guard_tokenizer

CONTEXT = 4096


def jinja(text: str, policy: str) -> str:
    """The text as a template, which takes a guideline as those of Google's checkpoints do."""
    index = "-2" if "the ring" in text else "-1"
    return (
        text.replace(policy, "{{ guideline }}")
        .replace("the user", f"{{{{ messages[{index}].content }}}}")
        .replace("the ring", "{{ messages[-1].content }}")
    )


TEMPLATE = (
    "{{ bos_token }}{% if messages[-1].role == 'user' %}"
    f"{jinja(PROMPT_TEXT, X.guideline(of_reply=False))}"
    "{% else %}"
    f"{jinja(REPLY_TEXT, X.guideline(of_reply=True))}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shield")
    vocabulary = guard_tokenizer(folder / "tokenizer.json").get_vocab_size()
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=CONTEXT,
        sliding_window=16,
        eos_token_id=1,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    names = {"bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    return export_folder(folder, "none", output, context=CONTEXT)


@pytest.mark.parametrize("reply", [None, "Bring the thing.\n\nThen sing <b>loudly</b>!"])
def test_scores_are_those_of_transformers_with_the_checkpoint_s_template(
    folder: Path, bundle: Bundle, reply: str | None
) -> None:
    prompt = "In which ring\n does the user sing?"
    turns = [{"role": "user", "content": prompt}]
    turns += [] if reply is None else [{"role": "assistant", "content": reply}]
    reference = AutoTokenizer.from_pretrained(folder)
    model = Gemma2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with Guard(bundle) as guard:
        scores = guard.check(prompt, reply)
        for policy in SHIELD_POLICIES:
            ids = reference.apply_chat_template(
                turns, guideline=policy.guideline(of_reply=reply is not None), return_dict=False
            )
            assert guard._encode(policy, prompt, reply) == ids
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            answers = [reference.convert_tokens_to_ids(answer) for answer in ("Yes", "No")]
            expected = float(logits[answers].softmax(-1)[0])
            assert scores[policy.name] == pytest.approx(expected, abs=1e-4)
