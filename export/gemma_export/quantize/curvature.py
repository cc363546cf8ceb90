"""What a matrix's rounding costs the model: a KL, not the distance of the matrix's own products.

An error E (N, K) of a matrix moves the model's distribution by a KL of about ½ tr(E A Eᵀ C) nats
per token: A is the Gram matrix of its inputs, C = E[g gᵀ] (N, N) weighs its outputs by `fisher`'s
gradients. They are the Kronecker factors of Fisher's information (K-FAC,
https://arxiv.org/abs/1503.05671). C is cut into blocks along its diagonal. E is of the recipe's own
rounding, calibrated or not.
"""

import torch
from torch import Tensor

from gemma_export.checkpoint import row_blocks
from gemma_export.checkpoint.safetensors import SafetensorsFile
from gemma_export.config import GemmaConfig, LayerSpec
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.arrange import TABLE_DAMPING, arrange_channels
from gemma_export.quantize.calibrator import Calibrator
from gemma_export.quantize.fisher import (
    back_bytes,
    end_way_back,
    information_peak_bytes,
    leave_errors,
    pass_back,
    residuals_before,
    start_way_back,
    table_information,
    way_bytes,
)
from gemma_export.quantize.gptq import Inputs, gptq, prepare
from gemma_export.quantize.pack import dequantize
from gemma_export.quantize.recipe import TABLE, Format
from gemma_export.quantize.round import round_rows
from gemma_export.quantize.stream import layer_names, load_layer, observe_layer, write_tensors

_WIDEST = 2048  # outputs of one block of C
_SPARSE = 4  # of so many blocks of a table, one is rounded by gptq


def measure_losses(work: Calibrator, tick: Tick) -> dict[str, float]:
    """KL per token, in nats, that each matrix costs when it is rounded alone.

    Takes up what is there: the losses of a layer are kept as soon as they are known.
    """
    config, table = work.checkpoint.config, work.file("loss-table")
    if not table.exists():
        for layer in reversed(config.layers[: start_way_back(work, tick)]):
            _measure_layer(work, layer)
            tick(f"layer {layer.index}, back", back_bytes(config))
        write_tensors(table, {TABLE: torch.tensor([_table_loss(work)])})
    end_way_back(work)
    losses: dict[str, float] = {}
    for path in (*(work.file("loss", layer.index) for layer in config.layers), table):
        file = SafetensorsFile(path)
        losses |= {name: float(file.rows(name, 0, 1)) for name in file.tensors}
    return losses


def loss_bytes(work: Calibrator) -> int:
    """Of weights that are still to be passed by, for progress."""
    return 0 if work.file("loss-table").exists() else way_bytes(work)


def loss_peak_bytes(config: GemmaConfig) -> int:
    """Memory that measuring takes beside the libraries, at most."""
    shapes = [config.tensor_shapes()[name] for name in layer_names(config, 0)]
    blocks = sum(4 * s[0] ** 2 // _blocks_of(s[0]) for s in shapes if len(s) == 2)
    inputs = max(s[1] for s in shapes if len(s) == 2)
    return information_peak_bytes(config, blocks) + 4 * 5 * inputs**2


def _measure_layer(work: Calibrator, layer: LayerSpec) -> None:
    """The losses of a layer's matrices, and the errors that the layer in front of it gets."""
    weights, formats = load_layer(work.checkpoint, layer.index), work.formats()
    grams = observe_layer(residuals_before(work, layer), work.checkpoint.config, layer, weights)
    errors, curvatures = pass_back(work, layer, _outer)

    def measure(name: str) -> float:
        gram = grams[name]
        inputs = prepare(gram) if work.recipe.rule(name).rounding == "gptq" else None
        error = _rounding_error(weights[name], formats[name], inputs)
        return _loss(error, gram, curvatures[name])

    losses = dict(zip(curvatures, in_order(measure, curvatures), strict=True))
    write_tensors(work.file("loss", layer.index), {n: torch.tensor([v]) for n, v in losses.items()})
    leave_errors(work, layer, errors)


def _outer(gradients: Tensor) -> Tensor:
    """Σ g gᵀ over (P, N), in blocks: (n, N / n, N / n)."""
    parts = gradients.view(len(gradients), _blocks_of(gradients.shape[1]), -1).transpose(0, 1)
    return parts.transpose(1, 2) @ parts  # parts are (n, P, N / n)


def _blocks_of(rows: int) -> int:
    """Into how many blocks the outputs of a matrix of so many are cut."""
    return next(n for n in range(-(-rows // _WIDEST), rows + 1) if rows % n == 0)


def _loss(error: Tensor, gram: Tensor, curvature: Tensor) -> float:
    """½ tr(E A Eᵀ C), with E (N, K), A (K, K) and the blocks of C (n, b, b)."""
    products = (error @ gram).view(len(curvature), -1, error.shape[1])
    return 0.5 * float((products * (curvature @ error.view_as(products))).sum())


def _table_loss(work: Calibrator) -> float:
    """½ Σ share · eᵀ H e over the table's rows; where they are rounded by gptq, over some."""
    curvature, shares = table_information(work)
    form, inputs = work.formats()[TABLE], None
    spans = list(row_blocks(work.checkpoint.config.tensor_shapes()[TABLE]))
    order = torch.arange(len(curvature))
    if work.recipe.rule(TABLE).rounding == "gptq":
        order = arrange_channels(work.checkpoint, curvature, form.group)
        curvature = curvature[order][:, order]
        inputs, spans = prepare(curvature, TABLE_DAMPING), spans[::_SPARSE]

    def measure(span: tuple[int, int]) -> tuple[float, float]:
        rows = work.checkpoint.rows(TABLE, *span)[:, order]
        error, share = _rounding_error(rows, form, inputs), shares[slice(*span)]
        return float(share @ ((error @ curvature) * error).sum(-1)), float(share.sum())

    losses, seen = zip(*in_order(measure, spans), strict=True)
    mean: float = sum(losses) / sum(seen)
    return 0.5 * mean * float(shares.sum())


def _rounding_error(rows: Tensor, form: Format, inputs: Inputs | None) -> Tensor:
    codes = gptq(rows, inputs, form, 0) if inputs else round_rows(rows, form, "searched")
    return rows - dequantize(codes, form)
