"""Feeds whole token lists to a session, without the beginning that it holds already."""

from collections.abc import Sequence

from gemma_runtime.errors import SessionError
from gemma_runtime.session import Logits, Session, check_tokens


def feed(session: Session, tokens: Sequence[int], chunk: int | None = None) -> Logits:
    """Make `tokens` what the session holds; returns the logits after the last one, (V,).

    With `chunk`, calls end at multiples of `chunk` tokens. Then the logits don't depend on what the
    session held, if all of it was fed with the same `chunk`, at most the bundle's prefill length.
    Raises SessionError without tokens, and ContextFull if they don't fit.
    """
    check_tokens(tokens)
    start = keep_beginning(session, tokens, len(tokens) - 1, 1 if chunk is None else chunk)
    step = chunk or len(tokens)
    for begin in range(start, len(tokens), step):
        logits = session.prefill(tokens[begin : begin + step])
    return logits


def keep_beginning(
    session: Session, tokens: Sequence[int], most: int | None = None, multiple: int = 1
) -> int:
    """Go back until the session holds nothing but a beginning of `tokens`; returns its length.

    It is the longest that the session can go back to, of at most `most` tokens and of a multiple
    of `multiple`.
    """
    if multiple < 1:
        raise SessionError(f"tokens can't be fed in chunks of {multiple}; give at least 1")
    position = min(common_length(session.tokens, tokens), len(tokens) if most is None else most)
    while True:
        position = session.rewind(position - position % multiple)
        if position % multiple == 0:
            return position


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
