"""Reads one layer's weights, and counts them."""

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint
from gemma_export.computing import CPU, product_dtype
from gemma_export.model.config import GemmaConfig
from gemma_export.model.decoder import norm_before
from gemma_export.quantize.store import QuantizedStore

_LAYERS = "model.layers."


def layer_names(config: GemmaConfig, index: int) -> list[str]:
    return [name for name in config.tensor_shapes() if name.startswith(f"{_LAYERS}{index}.")]


def layer_bytes(config: GemmaConfig) -> int:
    """Average bytes of a layer in float32."""
    shapes = config.tensor_shapes()
    layers = sum(prod(shape) for name, shape in shapes.items() if name.startswith(_LAYERS))
    return 4 * layers // len(config.kinds)


def largest_layer(config: GemmaConfig) -> int:
    """Weights of the largest layer."""
    shapes = config.tensor_shapes()
    return max(
        sum(prod(shapes[name]) for name in layer_names(config, layer.index))
        for layer in config.layers
    )


def load_layer(checkpoint: Checkpoint, index: int, device: torch.device = CPU) -> dict[str, Tensor]:
    """A layer's float32 weights, and the gain of the norm after it, on the device.

    The host holds one of them at a time.
    """
    return _load_layer(checkpoint.config, index, checkpoint.rows, device)


def load_stored_layer(
    store: QuantizedStore, config: GemmaConfig, index: int, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Like `load_layer`, from the store: dequantized weights."""
    return _load_layer(config, index, lambda name, *span: store.weight(name).rows(*span), device)


def _load_layer(
    config: GemmaConfig,
    index: int,
    rows: Callable[[str, int, int], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    shapes = config.tensor_shapes()
    names = [*layer_names(config, index), norm_before(config, index + 1)]
    return {name: rows(name, 0, shapes[name][0]).to(device) for name in names}


def short(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in the dtype used for matrix products; gains unchanged."""
    return {
        name: values.to(product_dtype(values.device)) if values.dim() == 2 else values
        for name, values in weights.items()
    }
