"""Finds a folder's tokenizer and chat template in every place where transformers looks.

Tokens that are named outside `tokenizer.json` are added to it, in transformers' order:
`added_tokens_decoder` of `tokenizer_config.json`, else `special_tokens_map.json` and
`added_tokens.json`; then the special tokens that `tokenizer_config.json` names.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.checkpoint.sentencepiece import tokenizer_from_sentencepiece
from gemma_export.formats.json_file import read_json
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.json_bytes import decode_json

_CONFIG = "tokenizer_config.json"
# Where a tokenizer and a chat template are looked for; the first is taken. The documentation's
# tables are made from these.
TOKENIZERS: Mapping[str, tuple[Callable[[Path], bytes], str]] = {
    "tokenizer.json": (Path.read_bytes, "as it is"),
    "tokenizer.model": (
        tokenizer_from_sentencepiece,
        "a SentencePiece model; the ids are those of transformers' GemmaTokenizer",
    ),
}
TEMPLATES: Mapping[str, str] = {
    "chat_template.jinja": "with `additional_chat_templates/*.jinja`, by their names",
    _CONFIG: "`chat_template`: a text, or a list with names",
    "processor_config.json": "the same",
    "chat_template.json": "the same",
}
ADDED_TOKENS: Mapping[str, str] = {
    f"`added_tokens_decoder` in `{_CONFIG}`": "all its tokens",
    "without it, `special_tokens_map.json` and `added_tokens.json`": "all their tokens",
    f"`{_CONFIG}`": "the special tokens that it names. A token that the model has no row for is "
    "left out, with a note",
}
# The names that transformers looks at before all others, in its order.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Json = dict[str, Any]


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint folder; None if it has neither form of one.

    Raises CheckpointError if a file is damaged. Added tokens beyond `vocab_size` are left out.
    """
    for name, (read, _) in TOKENIZERS.items():
        if (folder / name).exists():
            content, notes = _with_tokens(folder, read(folder / name), vocab_size)
            break
    else:
        return None
    return TokenizerFiles(content, read_chat_template(folder), _eos_piece(folder), notes)


def _eos_piece(folder: Path) -> str:
    """The tokenizer's `eos_token`; older folders name it in a map."""
    for name in (_CONFIG, "special_tokens_map.json"):
        if piece := _content(_read_json(folder / name).get("eos_token")):
            return piece
    return "<eos>"


def read_chat_template(folder: Path) -> str | None:
    """The chat template, or None if there is none.

    If there is one named `tool_use`, the result renders that one for conversations with tools.
    """
    found = (_templates_in(folder / name) for name in TEMPLATES)
    templates = next((templates for templates in found if templates), None)
    if templates is None:
        return None
    if "default" not in templates:
        raise CheckpointError(
            f"{folder} has the chat templates {', '.join(sorted(templates))}, expected one named "
            "'default'; rename one"
        )
    default, tool_use = templates["default"], templates.get("tool_use")
    if tool_use is None or tool_use == default:
        return default
    # Jinja drops one newline at the end of a template and one after a block.
    return (
        f"{{% if tools is not none %}}\n{tool_use.removesuffix(chr(10))}"
        f"{{%+ else %}}\n{default.removesuffix(chr(10))}{{%+ endif %}}"
    )


def _template_files(first: Path) -> dict[str, str]:
    """The templates of the files with nothing else in them."""
    folder = first.parent
    paths = {
        path.name.removesuffix(".jinja"): path
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if first.exists():
        # transformers reads this one first, so that one of the folder replaces it
        paths = {"default": first} | paths
    return {name: _read_text(path) for name, path in paths.items()}


def _templates_in(path: Path) -> dict[str, str]:
    """The templates by name; in a JSON file a string, a list with names, or a mapping."""
    if path.suffix == ".jinja":
        return _template_files(path)
    found = _read_json(path).get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        names = [entry.get("name") for entry in entries]
        if all(isinstance(name, str) for name in names):
            found = dict(zip(names, (entry.get("template") for entry in entries), strict=True))
    if not isinstance(found, dict | None) or any(
        not isinstance(text, str) for pair in (found or {}).items() for text in pair
    ):
        raise CheckpointError(
            f"{path}: chat_template is neither a string nor a list of names and templates; fix it"
        )
    return found or {}


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _Token(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    """What must be in a `tokenizer.json`, so that tokens can be added."""

    model: _Model
    added_tokens: list[_Token]


def _with_tokens(folder: Path, content: bytes, vocab_size: int) -> tuple[bytes, tuple[str, ...]]:
    """Add the tokens that other files name. Tokens listed there with ids get the flags listed."""
    try:
        state = decode_json(content, Json)
        vocabulary = msgspec.convert(state, _Tokenizer).model.vocab
    except msgspec.DecodeError:
        return content, ()  # whoever opens the tokenizer says what is wrong with it
    known: dict[str, Json] = {token["content"]: token for token in state["added_tokens"]}
    free = max([len(vocabulary), *(token["id"] + 1 for token in known.values())])
    before, left_out = dict(known), []
    for token, is_listed in _named_tokens(folder):
        text = token["content"]
        if text in known:
            known[text] = known[text] | (token if is_listed else {})
        elif (index := vocabulary.get(text, free)) < vocab_size:
            known[text] = {"id": index, **token}
            free = max(free, index + 1)
        else:
            left_out.append(text)
    if known != before:
        # by id: tokenizers numbers new tokens in the order of the list
        state["added_tokens"] = sorted(known.values(), key=lambda token: int(token["id"]))
        content = msgspec.json.encode(state)
    return content, _left_out_note(folder, left_out, vocab_size)


def _left_out_note(folder: Path, left_out: list[str], vocab_size: int) -> tuple[str, ...]:
    if not left_out:
        return ()
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return (
        f"{folder.name}: the added token {left_out[0]}{more} is left out, because the model has "
        f"rows for {vocab_size} tokens only",
    )


def _named_tokens(folder: Path) -> Iterator[tuple[Json, bool]]:
    """The tokens that other files than tokenizer.json name, and whether they are listed by id."""
    config = _read_json(folder / _CONFIG)
    listed = config.get("added_tokens_decoder")
    if listed is None:
        config |= _read_json(folder / "special_tokens_map.json")
    special = {_content(token) for token in _special_tokens(config)}
    try:
        if listed is None:
            named = _read_json(folder / "added_tokens.json")
            by_id = {int(index): text for text, index in named.items()}
        else:
            by_id = {int(index): token for index, token in (listed or {}).items()}
        added = [_added(token, _content(token) in special) for _, token in sorted(by_id.items())]
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: an added token in {_CONFIG} or added_tokens.json has no id or no content; "
            "save the tokenizer again"
        ) from error
    yield from ((token, True) for token in added)
    for token in _special_tokens(config):
        yield _added(token, True), False


def _special_tokens(config: Mapping[str, Any]) -> list[str | Json]:
    """The tokens with a role: bos and so on, then tokens of own roles, then those without one."""
    others = [key for key in config if key.endswith("_token") and key not in _NAMED]
    extra: Any = next((config[key] for key in _EXTRA if config.get(key)), [])
    values = [config.get(key) for key in (*_NAMED, *others)]
    if isinstance(extra, dict | list):
        values += extra.values() if isinstance(extra, dict) else extra
    return [value for value in values if isinstance(value, str | dict) and _content(value)]


def _content(token: object) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _added(token: str | Json, special: bool) -> Json:
    """An entry of `added_tokens`, without its id."""
    text = _content(token)
    if not text:
        raise ValueError(token)
    given = token if isinstance(token, dict) else {}
    special = special or bool(given.get("special", False))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    flags |= {key: given[key] for key in _FLAGS if isinstance(given.get(key), bool)}
    return {"content": text, **flags, "special": special}


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error


def _read_json(path: Path) -> Json:
    """The object in a JSON file; empty if there is no file."""
    return read_json(path) if path.exists() else {}
