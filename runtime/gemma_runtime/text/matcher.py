"""Follows a constrained reply token by token: which tokens may come next. V vocabulary."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError

Bits = NDArray[np.uint8]


class Matcher(Protocol):
    """The state of one reply. `Constraint.start` makes one; another engine needs these four."""

    def mask(self) -> Bits:
        """The tokens that may come next, (ceil(V / 8),): token t is bit `t % 8` of byte `t // 8`.

        Stop tokens are among them where the reply may end.
        """
        ...

    def accept(self, token: int) -> None:
        """Append a token. Raises ConstraintError if it may not come next."""
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that come next in every allowed reply, without stop tokens; not accepted."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether the reply is complete and nothing may follow."""
        ...


def allowed_tokens(bits: Bits, vocabulary_size: int) -> NDArray[np.intp]:
    """The tokens that a mask allows, (A,) of the model's V. Raises SessionError if there is none.

    A mask may be longer or shorter than the model's logits.
    """
    allowed = np.unpackbits(bits, count=vocabulary_size, bitorder="little").view(np.bool_)  # (V,)
    tokens = np.flatnonzero(allowed)
    if len(tokens) == 0:
        raise SessionError("the constraint allows none of the model's tokens here")
    return tokens
