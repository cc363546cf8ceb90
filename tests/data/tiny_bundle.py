"""Rebuilds `tests/data/tiny`, the bundle that the Python, Kotlin and Swift tests read.

    python -m tests.data.tiny_bundle

The bundle is a Gemma 2 with random weights, softcaps low enough to change the logits, a window
shorter than the context, a small tokenizer with every part of Gemma's, Gemma 2's chat format, which
here takes thoughts out of earlier replies, and Gemma 3's sampling values.

Also writes `tiny_tokens.json`: the tokens that the bundle generates greedily with its float
kernels, which give the same tokens on every processor.
"""

import json
import tempfile
from pathlib import Path
from shutil import rmtree

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.bundle import Bundle
from gemma_runtime.session import open_session
from gemma_runtime.text.generate import generate
from tests.export.models import Tiny
from tests.runtime.conftest import small_tokenizer

FOLDER = Path(__file__).parent / "tiny"
TOKENS = FOLDER.with_name("tiny_tokens.json")
CONTEXT, PREFILL = 96, 16

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{% set text = message['content'] %}\
{% if role == 'model' %}{% set text = text.split('</think>')[-1] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + text | trim + '<end_of_turn>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


def build(
    output: Path,
    target: str = "onnx",
    recipe: str = "int4",
    cache: str | None = None,
    calibration: Path | None = None,
) -> Bundle:
    """Export the tiny checkpoint, written to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        save_checkpoint(model)
        request = ExportRequest(
            targets=(target,),
            recipe=find_recipe(recipe),
            checkpoint=str(model),
            context_length=CONTEXT,
            prefill_length=PREFILL,
            cache=cache,
            calibration=calibration,
            output=output,
        )
        (result,) = export_bundles(request, QuietReporter())
    return result.bundle


def save_checkpoint(folder: Path) -> None:
    """Write the tiny checkpoint with tokenizer, chat template and sampling values."""
    tokenizer = small_tokenizer()
    _weights(tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 5]}
    (folder / "generation_config.json").write_text(json.dumps(sampling))


def greedy_tokens(bundle: Bundle) -> dict[str, list[int]]:
    prompt = [2, 300, 301]
    with open_session(bundle, threads=1, exact=True) as session:
        return {"prompt": prompt, "tokens": list(generate(session, prompt, max_new_tokens=64))}


def _weights(vocabulary: int) -> PreTrainedModel:
    """Random weights; a small embedding, or else each token would predict itself."""
    model = Tiny("tiny", _config(vocabulary), Gemma2ForCausalLM).build()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["model.embed_tokens.weight"].mul_(0.05)
        weights["model.norm.weight"].add_(40)
    return model


def _config(vocabulary: int) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        sliding_window=8,
        max_position_embeddings=256,
        dtype=torch.float32,
        bos_token_id=2,
        eos_token_id=1,
    )


if __name__ == "__main__":
    rmtree(FOLDER, ignore_errors=True)
    TOKENS.write_text(json.dumps(greedy_tokens(build(FOLDER))))
