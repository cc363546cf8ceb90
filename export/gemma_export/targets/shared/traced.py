"""Helpers of the torch modules that targets trace. T new tokens, D head size."""

from torch import Tensor


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], heads, -1).transpose(0, 1)  # (heads, T, D)


def buffer_name(weight: str) -> str:
    """A weight's name without dots, which torch does not allow in buffer names."""
    return weight.replace(".", "_")
