"""Fisher's information: how the float model's distribution follows from what is inside it.

The float model draws a label after every token; gradients of the labels' log-likelihood, squared
and averaged, say what a change costs: a KL of half of it, in nats per token.

Memory holds one layer: the way forward keeps the residuals between layers, the way back runs each
layer again. B sequences, T tokens, M width, V vocabulary, P = B · T.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.formats.blocks import BLOCK_ELEMENTS, row_blocks
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.memory import release_memory
from gemma_export.model.batch_ops import GradientOps, hold, product_dtype
from gemma_export.model.config import TABLE, GemmaConfig, LayerSpec
from gemma_export.model.decoder import norm_before
from gemma_export.model.torch_ops import rms_norm, soft_capped
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.stream import (
    RESIDUAL,
    layer_bytes,
    layer_names,
    load_layer,
    run_layer,
    short,
    write_tensors,
)
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.calibrate.workspace import Calibrator, pass_layers

_SEQUENCES = 64  # of the calibration text
_TOGETHER = 2  # sequences
_POSITIONS = 2048  # whose logits of a block of tokens are computed together
_BACK = 4  # times as long as a layer's way forward its way back takes
_SEED = 0


def start_way_back(work: Calibrator, tick: Tick) -> int:
    """Pass text forward and draw labels, or find it done; how many layers are still to go back."""
    lowest = _lowest(work)
    if lowest is not None:
        return lowest
    pass_layers(work, tick, "probe", _SEQUENCES, keep=True)
    count = len(work.checkpoint.config.kinds)
    write_tensors(_errors(work, count), _draw_errors(work, tick))
    return count


def residuals_before(work: Calibrator, layer: LayerSpec) -> Path:
    """What the layer was given on the way forward."""
    return work.file("probe", layer.index)


def pass_back(
    work: Calibrator, layer: LayerSpec, square: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients by what the layer was given (B, T, M).

    Also `square` of the gradients by what each matrix gives, (P without bos, outputs), averaged.
    """
    config = work.checkpoint.config
    residuals = SafetensorsFile(residuals_before(work, layer))
    errors = SafetensorsFile(_errors(work, layer.index + 1))
    held = hold(short(load_layer(work.checkpoint, layer.index)))
    count, length, _ = errors.tensors[RESIDUAL].shape

    def run(start: int) -> tuple[Tensor, dict[str, Tensor]]:
        span = start, min(start + _TOGETHER, count)
        x = residuals.rows(RESIDUAL, *span).requires_grad_()
        outputs: dict[str, Tensor] = {}
        ops = GradientOps(torch.empty(x.shape[:2]), config.rms_norm_eps, outputs)
        with torch.enable_grad():
            y = run_layer(ops, config, layer, held, x)
            y.backward(errors.rows(RESIDUAL, *span))  # type: ignore[no-untyped-call]
        assert x.grad is not None
        if square is None:
            return x.grad, {}
        return x.grad, {name: square(_gradient(y)) for name, y in outputs.items()}

    before: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for error, squares in in_order(run, range(0, count, _TOGETHER)):
        before.append(error)
        for name, values in squares.items():
            found[name] = found[name].add_(values) if name in found else values
    positions = count * (length - 1)
    return torch.cat(before), {name: values.div_(positions) for name, values in found.items()}


def leave_errors(work: Calibrator, layer: LayerSpec, errors: Tensor) -> None:
    """Write what `pass_back` gave: the layer is done with."""
    path = _errors(work, layer.index + 1)
    file = SafetensorsFile(path)
    rest = {n: file.rows(n, 0, i.shape[0]) for n, i in file.tensors.items() if n != RESIDUAL}
    write_tensors(_errors(work, layer.index), {RESIDUAL: errors, **rest})
    path.unlink()


def table_information(work: Calibrator) -> tuple[Tensor, Tensor]:
    """What errors of a row of the table cost, (M, M), and every row's share of that, (V,).

    It is embedding and head in one, and a token is about as often looked up as it is likely: the
    sum of E[h hᵀ] of the head's inputs and E[g gᵀ] of the gradients by embedded rows. All layers
    have been passed back.
    """
    config, file = work.checkpoint.config, SafetensorsFile(_errors(work, 0))
    found = {name: file.rows(name, 0, info.shape[0]) for name, info in file.tensors.items()}
    errors = found[RESIDUAL][:, 1:].flatten(0, 1)  # bos is one row of the table, and unlike others
    looked_up = errors.T @ errors * (config.embed_scale**2 / len(errors))
    return found["gram"] + looked_up, found["share"]


def end_way_back(work: Calibrator) -> None:
    """Delete what lay between layers."""
    count = len(work.checkpoint.config.kinds)
    for path in (_errors(work, 0), *(work.file("probe", i) for i in range(count + 1))):
        path.unlink(missing_ok=True)


def way_bytes(work: Calibrator) -> int:
    """Of weights that are still to be passed by, for progress."""
    config, lowest = work.checkpoint.config, _lowest(work)
    if lowest is not None:
        return lowest * back_bytes(config)
    layers = len(config.kinds) * (layer_bytes(config) + back_bytes(config))
    return layers + 3 * 4 * config.vocab_size * config.hidden_size


def back_bytes(config: GemmaConfig) -> int:
    """As many as passing one layer back counts for."""
    return _BACK * layer_bytes(config)


def information_peak_bytes(config: GemmaConfig, squares: int = 0) -> int:
    """Memory that the way back takes beside the libraries, at most; `squares` for each thread."""
    threads, width = (os.cpu_count() or 1) + 1, config.hidden_size
    shapes = [config.tensor_shapes()[name] for name in layer_names(config, 0)]
    matrices = [shape for shape in shapes if len(shape) == 2]
    outputs = 2 * sum(rows for rows, _ in matrices) + config.heads * LENGTH
    table = 4 * (3 + threads) * _SEQUENCES * LENGTH * width
    table += threads * 4 * 4 * _POSITIONS * BLOCK_ELEMENTS // width
    layer = 2 * layer_bytes(config) + 4 * sum({inputs**2 for _, inputs in matrices})
    layer += threads * (squares + 4 * 4 * _TOGETHER * LENGTH * outputs)
    return max(table, layer)


def _lowest(work: Calibrator) -> int | None:
    """The layer whose input's errors are known, and no lower one's."""
    layers = range(len(work.checkpoint.config.kinds) + 1)
    return next((i for i in layers if _errors(work, i).exists()), None)


def _errors(work: Calibrator, index: int) -> Path:
    return work.file("errors", index)


def _gradient(outputs: Tensor) -> Tensor:
    """(B, T, N) with a gradient → that of all tokens but bos."""
    assert outputs.grad is not None
    return outputs.grad[:, 1:].flatten(0, 1)


def _draw_errors(work: Calibrator, tick: Tick) -> dict[str, Tensor]:
    """The labels' gradient by the last residuals (B, T, M), and what the table's loss needs."""
    config = work.checkpoint.config
    last = norm_before(config, len(config.kinds))
    gain = work.checkpoint.rows(last, 0, config.hidden_size)
    file = SafetensorsFile(work.file("probe", len(config.kinds)))
    x = file.rows(RESIDUAL, 0, file.tensors[RESIDUAL].shape[0]).requires_grad_()
    with torch.enable_grad():
        y = rms_norm(x, gain, config.rms_norm_eps)
    h = y.detach().flatten(0, 1)  # (P, M)
    gradient, share = _label_gradient(work, h, tick)
    y.backward(gradient.view_as(y))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return {RESIDUAL: x.grad, "gram": h.T @ h / len(h), "share": share}


def _label_gradient(work: Calibrator, h: Tensor, tick: Tick) -> tuple[Tensor, Tensor]:
    """Of drawn labels' log-likelihood by the head's inputs (P, M), and how likely tokens are (V,).

    Twice over the table, a block of rows at a time: first every label's block is drawn, then the
    label from its block.
    """
    config = work.checkpoint.config
    inputs = _parts(h.to(product_dtype()))
    spans = list(row_blocks(config.tensor_shapes()[TABLE]))

    def weigh(span: tuple[int, int]) -> Tensor:
        rows = work.checkpoint.rows(TABLE, *span).to(inputs[0].dtype)
        return torch.cat([_logits(part, rows, config)[0].logsumexp(-1) for part in inputs])

    # Results are copied, and freed memory is given back: kept, they would hold all between them.
    by_block = torch.empty(len(h), len(spans))  # log of the likelihood of every block
    for index, weight in enumerate(in_order(weigh, spans)):
        by_block[:, index] = weight
        release_memory()
        tick("labels", 4 * (spans[index][1] - spans[index][0]) * config.hidden_size)
    totals = _parts(by_block.logsumexp(1, keepdim=True))
    drawn = torch.multinomial(by_block.softmax(1), 1, generator=_generator(0)).flatten()

    def pull(block: int) -> tuple[Tensor, Tensor]:
        rows = work.checkpoint.rows(TABLE, *spans[block]).to(inputs[0].dtype)
        pulled, share, generator = [], torch.zeros(len(rows)), _generator(block)
        for part, total, own in zip(inputs, totals, _parts(drawn), strict=True):
            z, slope = _logits(part, rows, config)
            p = z.sub_(total).exp_()
            share += p.sum(0)
            inside = (own == block).nonzero().flatten()
            if len(inside):
                label = torch.multinomial(p[inside], 1, generator=generator).flatten()
                p[inside, label] -= 1
            pulled.append(p.mul_(slope).to(rows.dtype) @ rows)
        return torch.cat(pulled), share

    gradient, shares = torch.zeros_like(h), torch.empty(spans[-1][1])
    for span, (pulled, share) in zip(spans, in_order(pull, range(len(spans))), strict=True):
        gradient += pulled
        shares[slice(*span)] = share
        release_memory()
        tick("labels", 2 * 4 * len(share) * config.hidden_size)
    return gradient, shares / len(h)


def _parts(x: Tensor) -> list[Tensor]:
    return [x[i : i + _POSITIONS] for i in range(0, len(x), _POSITIONS)]


def _logits(inputs: Tensor, rows: Tensor, config: GemmaConfig) -> tuple[Tensor, Tensor | float]:
    """Of a block of tokens (P, n), and how they follow what the softcap is applied to."""
    y, cap = functional.linear(inputs, rows).float(), config.final_softcap
    z = soft_capped(y, cap)
    return z, 1.0 if cap is None else 1 - (z / cap).square()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_SEED + seed)
