"""What torch modules that are traced for a delegate have in common. T new tokens, D head size."""

from torch import Tensor


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], heads, -1).transpose(0, 1)  # (heads, T, D)


def buffer_name(weight: str) -> str:
    """torch takes a dot in a buffer's name for a module's."""
    return weight.replace(".", "_")
