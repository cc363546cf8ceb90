"""Finds the tokens that end a reply: those that the files name, and what the template writes."""

from tokenizers import Tokenizer

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.progress import Reporter
from gemma_export.sidecars.turns import TURNS
from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.frame import CANONICAL_TEMPLATE, ChatFrame

_USER, _REPLY, _USER_2 = (f"{index}{'7' * 38}{index}" for index in range(3))


def find_stop_tokens(
    checkpoint: Checkpoint,
    files: TokenizerFiles | None,
    encoder: Tokenizer | None,
    report: Reporter,
) -> tuple[int, ...]:
    """All tokens that end a reply, without repetition.

    The union of config.json, generation_config.json, the tokenizer's `eos_token`, the end of
    Gemma's own turns, which base models' configs lack, and what the chat template writes after a
    reply. Tokens outside the vocabulary are left out with a note.
    """
    config = checkpoint.config
    found: list[int | None] = [*config.eos_tokens, *checkpoint.generation.stop_tokens]
    if files is not None and encoder is not None:
        found += [encoder.token_to_id(end) for end in (files.eos, *TURNS)]
        found += _template_ends(files, encoder, config.bos_token)
    tokens, size = dict.fromkeys(token for token in found if token is not None), config.vocab_size
    for token in tokens:
        if not 0 <= token < size:
            report.note(f"stop token {token} is left out: the vocabulary has only {size} tokens")
    return tuple(token for token in tokens if 0 <= token < size)


def _template_ends(files: TokenizerFiles, encoder: Tokenizer, bos: int) -> list[int]:
    """What the template writes after the last reply and after an earlier one."""
    template = CANONICAL_TEMPLATE if files.chat_template is None else files.chat_template
    frame = ChatFrame(template, encoder.id_to_token(bos) or "", files.eos)
    turns = [("user", _USER), ("assistant", _REPLY), ("user", _USER_2)]
    ends = []
    for count in (2, 3):
        try:
            text = frame.render(turns[:count])
        except TokenizerError:  # the template may want the user's turn last
            continue
        after = text.partition(_REPLY)[2].partition(_USER_2)[0]
        ends.append(_first_marker(encoder, after))
    return [end for end in ends if end is not None]


def _first_marker(encoder: Tokenizer, text: str) -> int | None:
    """The added token that begins `text`, or else the first special token in it.

    Added tokens that aren't special are also white space and HTML tags, which don't end a reply
    unless they follow it at once.
    """
    added = encoder.get_added_tokens_decoder()
    begins = [token for token, one in added.items() if _starts(text.lstrip(), one.content)]
    if begins:
        return max(begins, key=lambda token: len(added[token].content))
    return _earliest(text, {one.content: token for token, one in added.items() if one.special})


def _starts(text: str, piece: str) -> bool:
    return bool(piece.strip()) and text.startswith(piece)


def _earliest(text: str, pieces: dict[str, int]) -> int | None:
    places = [(text.find(piece), token) for piece, token in pieces.items() if piece in text]
    return min(places)[1] if places else None
