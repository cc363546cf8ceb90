"""Converts text to token ids and back, and keeps user text from becoming control tokens.

Control tokens are the special tokens and the reserved ones (`<mask>`, `<unused7>`). A template can
write them, user text never can, and decoding leaves them out. The tokens around FunctionGemma's
calls are not special: they are control tokens too, but decoding shows them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import tokenizers

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import TokenizerError

RESERVED = r"<unused[0-9]+>|<mask>|\[multimodal\]"
CALLS = r"<(start|end)_function_(declaration|call|response)>|<escape>"  # FunctionGemma's
# With these decoders a token's text doesn't depend on its neighbours, so it can be streamed.
_DECODERS = {"Replace", "ByteFallback", "Fuse"}


def load_tokenizer(bundle: Bundle) -> "Tokenizer":
    """The bundle's tokenizer. Raises TokenizerError if it has none."""
    if "tokenizer" not in bundle.manifest.roles:
        raise TokenizerError(
            f"{bundle.directory} has no tokenizer (bundles of random weights never have one); "
            "give token ids, or export from a checkpoint that has a tokenizer.json"
        )
    return Tokenizer(bundle.path("tokenizer"))


class Tokenizer:
    """A `tokenizer.json` like Gemma's: BPE with a byte token for every byte."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = _open(path)
        self._bytes = _byte_tokens(self._tokenizer)
        self._control = _control_tokens(self._tokenizer)
        self._marker = _marker_pattern(self._control)
        self._control_ids = frozenset(self._control.values())
        self._shown = _shown_tokens(self._tokenizer)

    @property
    def control_tokens(self) -> frozenset[int]:
        """The ids that only a template can write."""
        return self._control_ids

    @property
    def control_pieces(self) -> frozenset[str]:
        """The texts of the control tokens."""
        return frozenset(self._control)

    @property
    def vocabulary_size(self) -> int:
        """The largest id, plus 1."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def byte_tokens(self) -> Mapping[int, int]:
        """Byte -> the id of its token."""
        return {byte: token for token, byte in self._bytes.items()}

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """The ids of `text`, without bos.

        `control=True` encodes markers such as `<end_of_turn>` as control tokens: use it for
        templates only. Otherwise they are encoded as ordinary text: use it for user text.
        """
        if not control:
            return self._encode_text(text)
        ids: list[int] = []
        for part in self.split_control(text):
            ids += [part] if isinstance(part, int) else self._encode_text(part)
        return ids

    def split_control(self, text: str) -> Iterator[int | str]:
        """Split `text` into control tokens (as ids) and the text between them, in order."""
        start = 0
        for match in self._marker.finditer(text):
            if (token := self._control.get(match[0])) is None:
                continue
            if match.start() > start:
                yield text[start : match.start()]
            yield token
            start = match.end()
        if start < len(text):
            yield text[start:]

    def decode(self, tokens: Sequence[int], *, control: bool = False) -> str:
        """The text of `tokens`; U+FFFD for each byte that is not UTF-8.

        Control tokens are left out, or with `control=True` written as their names.
        """
        stream = self.stream()
        text = ""
        for token in tokens:
            hidden = control and token in self._control_ids - self._shown
            text += stream.flush() + (self.piece(token) or "") if hidden else stream.push(token)
        return text + stream.flush()

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary piece, e.g. `<eos>`; None if there is none."""
        return self._tokenizer.token_to_id(piece)

    def piece(self, token: int) -> str | None:
        """The vocabulary piece of an id; None if there is none."""
        return self._tokenizer.id_to_token(token)

    def token_text(self, token: int) -> str | int:
        """A token's text, or its byte as an int. Control and unknown tokens give ""."""
        if (byte := self._bytes.get(token)) is not None:
            return byte
        if token in self._control_ids and token not in self._shown:
            return ""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """A token's text in UTF-8, or its byte: part of a character, maybe."""
        text = self.token_text(token)
        return bytes([text]) if isinstance(text, int) else text.encode()

    def _encode_text(self, text: str) -> list[int]:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # tokenizers raises this for a lone surrogate
            raise TokenizerError(
                "the text contains a lone surrogate; decode its bytes as UTF-8 first"
            ) from error
        if self._control_ids.isdisjoint(ids):
            return ids
        return self._encode_cut(text)

    def _encode_cut(self, text: str) -> list[int]:
        """Encode text that contains control tokens' names, split after each one's first character.

        So that no name is encoded as its token.
        """
        cuts = [0, *(match.start() + 1 for match in self._marker.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        ids = [
            token
            for part in parts
            for token in self._tokenizer.encode(part, add_special_tokens=False).ids
        ]
        if control := self._control_ids.intersection(ids):
            raise TokenizerError(
                f"the text would become the control token {self.piece(min(control))!r}; remove it"
            )
        return ids


class StreamDecoder:
    """Decodes tokens one at a time and returns only complete characters.

    The texts from all pushes and the final flush, joined, equal `Tokenizer.decode` of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = bytearray()  # the bytes of an incomplete character

    def push(self, token: int) -> str:
        """Add a token; return the text that it completes."""
        text = self._tokenizer.token_text(token)
        if isinstance(text, str):
            return self.flush() + text if text else ""
        self._pending.append(text)
        return self._complete()

    def flush(self) -> str:
        """End the text; return a U+FFFD for each byte of an incomplete character."""
        replacements = "\ufffd" * len(self._pending)
        self._pending.clear()
        return replacements

    def _complete(self) -> str:
        text = ""
        while self._pending:
            try:
                text += self._pending.decode()
                self._pending.clear()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text += self._pending[: error.start].decode()
                text += "\ufffd" * (error.end - error.start)
                del self._pending[: error.end]
        return text


def _open(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).splitlines()[0]
        raise TokenizerError(f"{path} is not a tokenizer.json: {reason}; export again") from error
    _check_decoder(path, tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # encode their names in a text as text
    return tokenizer


def _check_decoder(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": None}
    steps = [step["type"] for step in state.get("decoders", [state])]
    if not set(steps) <= _DECODERS:
        raise TokenizerError(
            f"{path} decodes with {', '.join(map(str, steps))}, Gemma's with "
            f"{', '.join(sorted(_DECODERS))}; use the tokenizer that came with the checkpoint"
        )


def _byte_tokens(tokenizer: tokenizers.Tokenizer) -> dict[int, int]:
    """Token id -> its byte, for all byte tokens."""
    ids = ((tokenizer.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {token: byte for token, byte in ids if token is not None}


def _control_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """Piece -> id, for all control tokens."""
    return {
        added.content: token
        for token, added in tokenizer.get_added_tokens_decoder().items()
        if added.special or re.fullmatch(f"{RESERVED}|{CALLS}", added.content)
    }


def _shown_tokens(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """The control tokens that decoding shows."""
    return frozenset(
        token
        for token, added in tokenizer.get_added_tokens_decoder().items()
        if not added.special and re.fullmatch(CALLS, added.content)
    )


def _marker_pattern(control: dict[str, int]) -> re.Pattern[str]:
    """Matches every control token's name, and reserved names that the vocabulary may lack."""
    named = [piece for piece in control if not re.fullmatch(RESERVED, piece)]
    longest_first = sorted(named, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), RESERVED]))
