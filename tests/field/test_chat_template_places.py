"""A chat template is found in every place where transformers looks, in its order."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gemma_export.checkpoint.tokenizer_folder import read_chat_template
from gemma_runtime.errors import CheckpointError
from gemma_runtime.text.template import render_template
from tests.runtime.conftest import small_tokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]


def template(name: str, ending: str = "\n") -> str:
    return f"{name}: {{% for m in messages %}}\n  {{{{ m.content }}}}\n{{% endfor %}}{ending}"


def named(*names: str) -> dict[str, Any]:
    return {"chat_template": [{"name": name, "template": template(name)} for name in names]}


ENDINGS = {f"tool_use{i}": template("tools", end) for i, end in enumerate(["", "\n", "\n\n", " "])}
PLACES: dict[str, dict[str, Any]] = {
    "file": {"chat_template.jinja": template("file")},
    "config": {"tokenizer_config.json": {"chat_template": template("config")}},
    "list": {"tokenizer_config.json": named("rag", "default")},
    "list with tools": {"tokenizer_config.json": named("default", "tool_use")},
    "file before config": {
        "chat_template.jinja": template("file"),
        "tokenizer_config.json": named("default", "tool_use"),
    },
    "folder": {
        "chat_template.jinja": template("file"),
        "additional_chat_templates/tool_use.jinja": template("more"),
        "additional_chat_templates/rag.jinja": template("rag"),
    },
    "folder with default": {
        "chat_template.jinja": template("file"),
        "additional_chat_templates/default.jinja": template("more"),
        "tokenizer_config.json": {"chat_template": template("config")},
    },
    **{
        name: {
            "chat_template.jinja": template("file", text[-2:]),
            "additional_chat_templates/tool_use.jinja": text,
        }
        for name, text in ENDINGS.items()
    },
}


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, "utf-8")


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("files", PLACES.values(), ids=list(PLACES))
def test_chats_are_rendered_as_transformers_renders_them(
    tmp_path: Path, files: dict[str, Any], tools: list[Any] | None
) -> None:
    write(tmp_path, files)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    messages = [{"role": "user", "content": "hi"}]
    reference = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tools=tools, tokenize=False
    )
    found = read_chat_template(tmp_path)
    assert found is not None
    assert render_template(found, {"messages": messages, "tools": tools}) == reference


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": {"chat_template": "legacy"}}, "legacy"),
        ({"processor_config.json": {"chat_template": "own"}}, "own"),
        (
            {
                "chat_template.json": {"chat_template": "legacy"},
                "processor_config.json": {"chat_template": "own"},
            },
            "own",
        ),
        (
            {
                "chat_template.json": {"chat_template": "legacy"},
                "tokenizer_config.json": {"chat_template": "config"},
            },
            "config",
        ),
        ({"tokenizer_config.json": {}, "processor_config.json": {}}, None),
        ({}, None),
    ],
)
def test_the_processor_s_places_come_last(
    tmp_path: Path, files: dict[str, Any], expected: str | None
) -> None:
    """transformers' tokenizers don't read them; its processors do."""
    write(tmp_path, files)
    assert read_chat_template(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"tokenizer_config.json": named("rag", "x")}, "templates rag, x, expected .* 'default'"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template is neither"),
        ({"chat_template.json": {"chat_template": [{"name": "default"}]}}, "is neither"),
        ({"chat_template.json": "{"}, "chat_template.json is not valid JSON"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, files: dict[str, Any], match: str) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=match):
        read_chat_template(tmp_path)
