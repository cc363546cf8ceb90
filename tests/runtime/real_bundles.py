"""Exports a bundle that runs, with random weights and a small tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gemma_runtime.bundle import MANIFEST, Bundle, describe_files, open_bundle
from gemma_runtime.manifest import Manifest


def export_random(
    folder: Path,
    tokenizer: Path,
    *,
    context_length: int = 64,
    seed: int = 7,
    recipe: str = "none",
) -> Bundle:
    """Export a tiny Gemma 3 with random weights and this tokenizer; skip without torch."""
    pytest.importorskip("torch")
    from gemma_export.pipeline import ExportRequest, export_bundles
    from gemma_export.progress import QuietReporter
    from gemma_export.quantize.recipe import find_recipe

    folder.mkdir(parents=True)
    config = folder / "config.json"
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    config.write_text(json.dumps(_config(vocabulary, max(256, context_length))))
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe(recipe),
        checkpoint=f"random:{seed}",
        config_file=config,
        context_length=context_length,
        prefill_length=24,
        output=folder / "bundle",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_EXPORT_CACHE", str(folder / "cache"))
        (result,) = export_bundles(request, QuietReporter())
    return _with_tokenizer(result.bundle, tokenizer)


def _config(vocabulary: int, longest: int) -> dict[str, object]:
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": longest,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


def _with_tokenizer(bundle: Bundle, tokenizer: Path) -> Bundle:
    """Add a tokenizer, which an export of random weights doesn't have."""
    (bundle.directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    manifest: Manifest = replace(
        bundle.manifest,
        files=dict(describe_files(bundle.directory)),
        roles={**bundle.manifest.roles, "tokenizer": "tokenizer.json"},
    )
    (bundle.directory / MANIFEST).write_bytes(manifest.to_json())
    return open_bundle(bundle.directory)
