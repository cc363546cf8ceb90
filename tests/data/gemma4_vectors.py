"""What the Kotlin and Swift ports must reproduce of Gemma 4's chats: its turns and its thoughts.

`phone_vectors` writes the results. The folder `gemma4` has the two files that phones read of a
bundle, with the small tokenizer under Gemma 4's names.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma_export.sidecars.chat_format import chat_format
from gemma_export.sidecars.compact_tokenizer import compact_tokenizer
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.thoughts import Thoughts
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS, gemma4_tokenizer

FOLDER = Path(__file__).with_name("gemma4")

# Written by us after the larger models' template: a system turn of its own, in which thoughts are
# asked for, and an empty thought where they are not.
TEMPLATE = """\
{%- macro without_thoughts(text) -%}
    {%- for part in text.split('<channel|>') -%}{{- part.split('<|channel>')[0] -}}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turns = messages -%}
{%- if enable_thinking or messages[0].role == 'system' -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {%- if messages[0].role == 'system' -%}
        {{- messages[0].content | trim -}}
        {%- set turns = messages[1:] -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role == 'assistant' -%}
        {{- '<|turn>model\\n' + without_thoughts(turn.content) | trim + '<turn|>\\n' -}}
    {%- else -%}
        {{- '<|turn>' + turn.role + '\\n' + turn.content | trim + '<turn|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
CHATS = [
    [("user", "the user")],
    [("user", "in"), ("assistant", " the inn \n"), ("user", "ing?")],
    [("system", " be brief "), ("user", "hello <turn|>\n<|turn>model\nno")],
    [("system", "the"), ("user", "a"), ("assistant", "é😀"), ("user", "<|think|>b")],
]
REPLIES = [
    "<|channel>thought\nin the<channel|>user",
    "the <|channel>thought\n\n in é\n<channel|> user<|channel>thought\ning<channel|>s",
    "<|channel>thought\n<channel|>the",
    "<|channel>no name",
    "<|channel>thought\nan end without an answer é",
    "the <channel|> user",
    "é😀 <0xFF> the",
]


def write_files() -> None:
    """Write the folder's files."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_bytes(content)


def files() -> dict[str, bytes]:
    return {
        "tokenizer.gtok": compact_tokenizer(gemma4_tokenizer().to_str().encode()),
        "chat.json": chat_format(TEMPLATE, "<bos>", "<eos>").to_json(),
    }


def vectors() -> dict[str, object]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        gemma4_tokenizer().save(str(path))
        tokenizer = Tokenizer(path)
    return {
        "chat": [one for turns in CHATS for one in _prompts(tokenizer, turns)],
        "thoughts": [one for text in REPLIES for one in _replies(tokenizer, text)],
    }


def _prompts(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> Iterator[dict[str, object]]:
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    for thinking in (False, True):
        yield {
            "messages": [{"role": role, "content": content} for role, content in turns],
            "thinking": thinking,
            "ids": encode_chat(tokenizer, TEMPLATE, messages, BOS, thinking=thinking),
        }


def _replies(tokenizer: Tokenizer, text: str) -> Iterator[dict[str, object]]:
    """A reply, whole and cut off before its last token."""
    ids = tokenizer.encode(text, control=True)
    for tokens in (ids, ids[:-1]):
        stream, thoughts = tokenizer.stream(), Thoughts(tokenizer, ())
        pieces = [(token, stream.push(token)) for token in tokens]
        shown = ["" if thoughts.take(token, piece) else piece for token, piece in pieces]
        rest = thoughts.end(stream.flush())
        yield {"ids": tokens, "pieces": shown, "flush": rest, "thought": thoughts.text}
