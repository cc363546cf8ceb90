"""The turns of checkpoints without a chat template, by the markers that their vocabulary has."""

from collections.abc import Mapping
from dataclasses import replace

from tokenizers import Tokenizer

from gemma_export.checkpoint import TokenizerFiles
from gemma_runtime.text.frame import CANONICAL_TEMPLATE

# Gemma 4's format, written by us: the system turn is a role of its own.
_GEMMA4 = """\
{{ bos_token }}
{%- for message in messages %}
    {%- set speaker = "model" if message.role == "assistant" else message.role %}
    {{- "<|turn>" + speaker + "\\n" + message.content | trim + "<turn|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|turn>model\\n" }}
{%- endif %}
"""
# The token that ends a turn → the template that writes it.
TURNS: Mapping[str, str] = {"<end_of_turn>": CANONICAL_TEMPLATE, "<turn|>": _GEMMA4}


def with_turns(files: TokenizerFiles, encoder: Tokenizer) -> TokenizerFiles:
    """The files, with a template if they have none and Gemma's older turns are not the right ones.

    Without a template, programs write those older turns.
    """
    if files.chat_template is not None:
        return files
    found = [text for end, text in TURNS.items() if encoder.token_to_id(end) is not None]
    if not found or found[0] == CANONICAL_TEMPLATE:
        return files
    return replace(files, chat_template=found[0])
