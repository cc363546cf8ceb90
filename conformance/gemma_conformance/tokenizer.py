"""A tiny tokenizer of Gemma's kind: byte-fallback BPE, spaces as `▁`, turns as control tokens."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

_LETTERS = [chr(code) for code in range(33, 127)]
_PAIRS = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("in", "g"), ("e", "r"), ("▁", "▁")]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_UNUSED = [f"<unused{number}>" for number in range(14)]
VOCABULARY = 384  # with a few that no text gives
MESSAGES = (
    {"role": "user", "content": "Name the thing in the north."},
    {"role": "assistant", "content": "The ring."},
    {"role": "user", "content": "  Why? 7 + 5 = 12 \n"},
)


def build_tokenizer(turn: tuple[str, str]) -> Tokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *turn, *_UNUSED]
    pieces = [*special, *["\n" * count for count in range(1, 5)], *_BYTES, "▁", *_LETTERS]
    pieces += [a + b for a, b in _PAIRS]
    pieces += [f"<spare{number}>" for number in range(VOCABULARY - len(pieces))]
    bpe = models.BPE(
        {piece: token for token, piece in enumerate(pieces)},
        _PAIRS,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in special]
    )
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in range(1, 5)])
    return tokenizer


def save_tokenizer(folder: Path, turn: tuple[str, str]) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    build_tokenizer(turn).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(turn),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def chat_template(turn: tuple[str, str]) -> str:
    """Gemma's template: it writes the bos token itself, and strips the messages."""
    begin, end = turn
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        f"{{{{ '{begin}' + role + '\n' + message['content'] | trim + '{end}\n' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{begin}model\n' }}}}{{% endif %}}"
    )


def chat_tokens(turn: tuple[str, str]) -> list[int]:
    """The tokens of MESSAGES and the beginning of a reply. Written without the template."""
    tokenizer = build_tokenizer(turn)
    bos, begin, end, newline = tokenizer.encode(
        f"<bos>{turn[0]}{turn[1]}\n", add_special_tokens=False
    ).ids
    tokens: list[int] = [bos]
    for message in MESSAGES:
        role = "model" if message["role"] == "assistant" else message["role"]
        text = f"{role}\n{message['content'].strip()}"
        tokens += [begin, *tokenizer.encode(text, add_special_tokens=False).ids, end, newline]
    return [*tokens, begin, *tokenizer.encode("model\n", add_special_tokens=False).ids]
