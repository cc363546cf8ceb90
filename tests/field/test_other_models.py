"""Models that look like a Gemma 2 or 3 but are not causal language models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gemma_export.checkpoint.folder import open_folder
from gemma_runtime.errors import ConfigError
from tests.field.folders import check_same, config_of, configure, transformers_logits

OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "reward": (
        {"architectures": ["Gemma2ForSequenceClassification"]},
        r"architectures is \['Gemma2ForSequenceClassification'\], expected a causal language",
    ),
    "tokens": (
        {"architectures": ["Gemma2ForTokenClassification"]},
        "Gemma2ForTokenClassification",
    ),
    "embedding": (  # of Gemma 3's text models, only EmbeddingGemma has it
        {"use_bidirectional_attention": True},
        r"architectures is \['Gemma3ForCausalLM'\], expected an encoder: Gemma3TextModel",
    ),
    "bidirectional": ({"bidirectional": True}, "bidirectional is True"),
    "not causal": ({"is_causal": False}, "is_causal is False"),
    "own code": (
        {"auto_map": {"AutoModel": "modeling_x.BidirectionalGemma"}},
        "auto_map AutoModel is 'BidirectionalGemma', expected no code of its own",
    ),
}


@pytest.mark.parametrize(("fields", "match"), OTHERS.values(), ids=list(OTHERS))
def test_a_model_that_is_not_causal_is_refused_by_name(
    folder: Path, fields: dict[str, Any], match: str
) -> None:
    configure(folder, **fields)
    with pytest.raises(ConfigError, match=match) as error:
        open_folder(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("outer", ["paligemma", "shieldgemma2", "gemma3n", "colgemma", None, 3])
def test_a_text_model_inside_another_model_is_refused_by_the_outer_name(
    folder: Path, outer: str | int | None
) -> None:
    """PaliGemma's prefix attends in both directions, so its Gemma is not causal."""
    text = config_of(folder)
    (folder / "config.json").write_text("{}")
    configure(folder, model_type=outer, text_config=text)
    with pytest.raises(ConfigError, match=f"model_type {outer!r} is not supported"):
        open_folder(folder)


def test_attention_direction_is_read_inside_a_multimodal_config_too(folder: Path) -> None:
    text = {**config_of(folder), "is_causal": False}
    configure(folder, model_type="gemma3", architectures=None, text_config=text)
    with pytest.raises(ConfigError, match="is_causal is False"):
        open_folder(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["Gemma3TextModel"]},
        {"architectures": None},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.Own", None]}},
        {"use_bidirectional_attention": False, "is_causal": True},
    ],
    ids=["base", "unnamed", "tokenizer code", "explicit"],
)
def test_what_is_known_to_be_causal_is_read(folder: Path, fields: dict[str, Any]) -> None:
    configure(folder, **fields)
    check_same(open_folder(folder), transformers_logits(folder))
