"""What a matrix's rounding costs the model: a KL, not the distance of the matrix's own products.

An error E (N, K) of a matrix moves the model's distribution by a KL of about ½ tr(E A Eᵀ C) nats
per token: A is the Gram matrix of its inputs, C (N, N) weighs its outputs. They are the Kronecker
factors of Fisher's information (K-FAC, https://arxiv.org/abs/1503.05671): the float model draws a
label after every token, and C = E[g gᵀ] over the gradients g (N,) of the labels' log-likelihood by
the outputs.

Memory holds one layer: the way forward keeps the residuals between layers, the way back runs each
layer again. C is cut into blocks along its diagonal. B sequences, T tokens, M width, P = B · T.
"""

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.batch_ops import GradientOps, hold, product_dtype
from gemma_export.checkpoint import BLOCK_ELEMENTS, row_blocks
from gemma_export.checkpoint.safetensors import SafetensorsFile
from gemma_export.config import GemmaConfig, LayerSpec
from gemma_export.decoder import norm_before
from gemma_export.memory import release_memory
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibration import LENGTH
from gemma_export.quantize.calibrator import Calibrator, pass_layers
from gemma_export.quantize.pack import dequantize
from gemma_export.quantize.recipe import TABLE, Format
from gemma_export.quantize.round import round_rows
from gemma_export.quantize.stream import (
    RESIDUAL,
    layer_bytes,
    layer_names,
    load_layer,
    observe_layer,
    run_layer,
    short,
    write_tensors,
)
from gemma_export.torch_ops import soft_capped

_SEQUENCES = 64  # of the calibration text
_WIDEST = 2048  # outputs of one block of C
_TOGETHER = 2  # sequences
_POSITIONS = 2048  # whose logits of a block of tokens are computed together
_BACK = 4  # times as long as a layer's way forward its way back takes
_SEED = 0


def measure_losses(work: Calibrator, tick: Tick) -> dict[str, float]:
    """KL per token, in nats, that each matrix costs when it is rounded alone.

    Takes up what is there: the losses of a layer are kept as soon as they are known.
    """
    config, lowest = work.checkpoint.config, _lowest(work)
    if lowest is None:
        pass_layers(work, tick, "probe", _SEQUENCES, keep=True)
        lowest = len(config.kinds)
        write_tensors(_errors(work, lowest), _draw_errors(work, tick))
    for layer in reversed(config.layers[:lowest]):
        _pass_back(work, layer)
        tick(f"layer {layer.index}, back", _BACK * layer_bytes(config))
    if not work.file("loss-table").exists():
        write_tensors(work.file("loss-table"), {TABLE: torch.tensor([_table_loss(work)])})
    for path in (_errors(work, 0), *(work.file("probe", i) for i in range(len(config.kinds) + 1))):
        path.unlink(missing_ok=True)
    losses: dict[str, float] = {}
    for path in (
        *(work.file("loss", layer.index) for layer in config.layers),
        work.file("loss-table"),
    ):
        file = SafetensorsFile(path)
        losses |= {name: float(file.rows(name, 0, 1)) for name in file.tensors}
    return losses


def loss_bytes(work: Calibrator) -> int:
    """Of weights that are still to be passed by, for progress."""
    config, lowest = work.checkpoint.config, _lowest(work)
    if lowest is not None:
        return _BACK * lowest * layer_bytes(config)
    layers = len(config.kinds) * layer_bytes(config)
    return (1 + _BACK) * layers + 3 * 4 * config.vocab_size * config.hidden_size


def loss_peak_bytes(config: GemmaConfig) -> int:
    """Memory that measuring takes beside the libraries, at most."""
    threads, width = (os.cpu_count() or 1) + 1, config.hidden_size
    shapes = [config.tensor_shapes()[name] for name in layer_names(config, 0)]
    matrices = [shape for shape in shapes if len(shape) == 2]
    curvature = sum(4 * rows * rows // _blocks_of(rows) for rows, _ in matrices)
    outputs = 2 * sum(rows for rows, _ in matrices) + config.heads * LENGTH
    table = 4 * (3 + threads) * _SEQUENCES * LENGTH * width
    table += threads * 4 * 4 * _POSITIONS * BLOCK_ELEMENTS // width
    layer = 2 * layer_bytes(config) + 4 * sum({inputs**2 for _, inputs in matrices})
    layer += threads * (curvature + 4 * 4 * _TOGETHER * LENGTH * outputs)
    return max(table, layer)


def _lowest(work: Calibrator) -> int | None:
    """The layer whose input's errors are known, and no lower one's: 0 when nothing is left."""
    if work.file("loss-table").exists():
        return 0
    layers = range(len(work.checkpoint.config.kinds) + 1)
    return next((i for i in layers if _errors(work, i).exists()), None)


def _errors(work: Calibrator, index: int) -> Path:
    return work.file("errors", index)


def _draw_errors(work: Calibrator, tick: Tick) -> dict[str, Tensor]:
    """The labels' gradient by the last residuals (B, T, M), and what the table's loss needs."""
    config = work.checkpoint.config
    last = norm_before(config, len(config.kinds))
    gain = work.checkpoint.rows(last, 0, config.hidden_size)
    file = SafetensorsFile(work.file("probe", len(config.kinds)))
    x = file.rows(RESIDUAL, 0, file.tensors[RESIDUAL].shape[0]).requires_grad_()
    with torch.enable_grad():
        y = functional.rms_norm(x, x.shape[-1:], 1 + gain, config.rms_norm_eps)
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


def _pass_back(work: Calibrator, layer: LayerSpec) -> None:
    """The losses of a layer's matrices, and the errors that the layer in front of it gets."""
    config = work.checkpoint.config
    source, file = work.file("probe", layer.index), _errors(work, layer.index + 1)
    residuals, errors = SafetensorsFile(source), SafetensorsFile(file)
    weights = load_layer(work.checkpoint, layer.index)
    grams = observe_layer(source, config, layer, weights)
    held = hold(short(weights))

    def run(start: int) -> tuple[Tensor, dict[str, Tensor]]:
        span = start, min(start + _TOGETHER, count)
        x = residuals.rows(RESIDUAL, *span).requires_grad_()
        outputs: dict[str, Tensor] = {}
        ops = GradientOps(torch.empty(x.shape[:2]), config.rms_norm_eps, outputs)
        with torch.enable_grad():
            y = run_layer(ops, config, layer, held, x)
            y.backward(errors.rows(RESIDUAL, *span))  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad, {name: _outer(y) for name, y in outputs.items()}

    count, length, _ = errors.tensors[RESIDUAL].shape
    before: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for error, outer in in_order(run, range(0, count, _TOGETHER)):
        before.append(error)
        for name, blocks in outer.items():
            found[name] = found[name].add_(blocks) if name in found else blocks
    positions = count * (length - 1)
    formats = work.formats()
    losses = {
        name: _loss(_rounding_error(weights[name], formats[name]), grams[name], blocks / positions)
        for name, blocks in found.items()
    }
    write_tensors(work.file("loss", layer.index), {n: torch.tensor([v]) for n, v in losses.items()})
    rest = {n: errors.rows(n, 0, i.shape[0]) for n, i in errors.tensors.items() if n != RESIDUAL}
    write_tensors(_errors(work, layer.index), {RESIDUAL: torch.cat(before), **rest})
    file.unlink()


def _outer(outputs: Tensor) -> Tensor:
    """Σ g gᵀ over all tokens but bos, in blocks: (n, N / n, N / n)."""
    assert outputs.grad is not None
    g = outputs.grad[:, 1:].flatten(0, 1)
    parts = g.view(len(g), _blocks_of(g.shape[1]), -1).transpose(0, 1)  # (n, P, N / n)
    return parts.transpose(1, 2) @ parts


def _blocks_of(rows: int) -> int:
    """Into how many blocks the outputs of a matrix of so many are cut."""
    return next(n for n in range(-(-rows // _WIDEST), rows + 1) if rows % n == 0)


def _loss(error: Tensor, gram: Tensor, curvature: Tensor) -> float:
    """½ tr(E A Eᵀ C), with E (N, K), A (K, K) and the blocks of C (n, b, b)."""
    products = (error @ gram).view(len(curvature), -1, error.shape[1])
    return 0.5 * float((products * (curvature @ error.view_as(products))).sum())


def _table_loss(work: Calibrator) -> float:
    """½ Σ share · eᵀ H e over the table's rows.

    It is embedding and head in one, and a token is about as often looked up as it is likely: H is
    E[h hᵀ] of the head's inputs plus E[g gᵀ] of the gradients by embedded rows.
    """
    config, file = work.checkpoint.config, SafetensorsFile(_errors(work, 0))
    found = {name: file.rows(name, 0, info.shape[0]) for name, info in file.tensors.items()}
    errors = found[RESIDUAL][:, 1:].flatten(0, 1)  # bos is one row of the table, and unlike others
    gram = found["gram"] + errors.T @ errors * (config.embed_scale**2 / len(errors))
    form = work.formats()[TABLE]

    def measure(span: tuple[int, int]) -> float:
        error = _rounding_error(work.checkpoint.rows(TABLE, *span), form)
        return 0.5 * float(found["share"][slice(*span)] @ ((error @ gram) * error).sum(-1))

    return sum(in_order(measure, row_blocks(config.tensor_shapes()[TABLE])))


def _rounding_error(rows: Tensor, form: Format) -> Tensor:
    return rows - dequantize(round_rows(rows, form, "searched"), form)
