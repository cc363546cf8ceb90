"""Fisher information of the float model: how much its distribution reacts to inner changes.

Labels are sampled from the float model's own distribution after every token. The mean squared
gradient of their log-likelihood gives the cost of a change: half of it is the KL in nats per token.

One layer is in memory at a time: the forward pass stores the residuals between layers, the backward
pass runs each layer again. B sequences, T tokens, M width, V vocabulary, P = B · T.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export import shards
from gemma_export.computing import product_dtype
from gemma_export.device import HOST, grain
from gemma_export.formats.blocks import BLOCK_ELEMENTS, row_blocks
from gemma_export.memory import release_memory
from gemma_export.model.batch_ops import BatchOps, GradientOps, hold
from gemma_export.model.config import HEAD, TABLE, GemmaConfig, LayerSpec
from gemma_export.model.decoder import norm_before, per_layer_parts
from gemma_export.model.torch_ops import rms_norm, soft_capped
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.arrange import arrange_channels
from gemma_export.quantize.calibrate.flow import (
    KEYS,
    RESIDUAL,
    VALUES,
    Batch,
    FlowReader,
    LayerInputs,
    embedding_weights,
    joined,
    read_share,
    split,
    write_rows,
    write_shared,
)
from gemma_export.quantize.calibrate.layer_weights import (
    layer_bytes,
    layer_names,
    load_layer,
    short,
)
from gemma_export.quantize.calibrate.stream import pass_layers, run_layer
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.calibrate.workspace import Workspace, curvature_name
from gemma_export.shards import HELD, Share, Sums

SEQUENCES = 64  # of the calibration text
_TOGETHER = 2  # sequences per backward pass
_POSITIONS = 2048  # positions whose logits are computed together
_BACK = 4  # cost of a layer's backward pass relative to its forward pass
_SEED = 0


def weigh_table(work: Workspace, tick: Tick) -> None:
    """Find the order of the residual channels, and the curvature of table and head in that order.

    Only if gptq rounds one of them. Writes `channel_order`, with column factors if some columns
    are int8.
    """
    config = work.checkpoint.config
    for layer in reversed(config.layers[: start_backward(work, tick)]):
        errors, _ = backward_layer(work, layer)
        store_errors(work, layer, errors)
        tick(f"layer {layer.index}, back", layer_backward_bytes(config))
    curvatures, _ = table_information(work)
    fmt = work.formats()[config.head]
    arrangement = shards.from_first(lambda: arrange_channels(work.checkpoint, curvatures, fmt))
    arranged = {
        curvature_name(name): arrangement.curvature(curvature.cpu())
        for name, curvature in curvatures.items()
    }
    write_shared(work.channel_order, arrangement.tensors() | arranged)
    work.end_backward()


def start_backward(work: Workspace, tick: Tick) -> int:
    """Run the forward pass and sample labels, unless done; returns the layers left to go back."""
    lowest = shards.resumed_at(work.errors.lowest(), max)
    if lowest is not None:
        return lowest
    pass_layers(work, work.float_residuals, tick, SEQUENCES, keep=True)
    write_rows(work.errors.last, _draw_errors(work, tick), _share(work))
    return len(work.checkpoint.config.kinds)


def backward_layer(
    work: Workspace, layer: LayerSpec, square: Callable[[Tensor], Tensor] | None = None
) -> tuple[LayerInputs, dict[str, Tensor]]:
    """Run one layer backward: the gradients with respect to all that it reads of this rank's text.

    Also, per matrix, the mean of `square` over the gradients with respect to its output, each
    (P without bos, outputs), of the text of all ranks.
    """
    config = work.checkpoint.config
    reader = FlowReader(work.float_residuals, config, layer)
    errors = work.open(work.errors[layer.index + 1])
    names = (RESIDUAL, *(_lent(layer.index) if layer.index in config.lenders else ()))
    held = hold(short(load_layer(work.checkpoint, layer.index, work.device)))

    def run(batch: Batch) -> tuple[LayerInputs, dict[str, Tensor]]:
        span = batch.span
        inputs = reader.read(*span).tracked()
        ops = GradientOps(torch.empty(inputs.x.shape[:2]), config.rms_norm_eps)
        with torch.enable_grad():
            y = run_layer(ops, config, layer, held, inputs)
            results = (y, *ops.lent[layer.kind])[: len(names)]
            torch.autograd.backward(results, [errors.rows(name, *span) for name in names])
        if square is None:
            return inputs.gradients(), {}
        return inputs.gradients(), {name: square(_gradient(y)) for name, y in ops.outputs.items()}

    before: list[LayerInputs] = []
    spans, sums = split(reader.share, _TOGETHER), Sums()
    for batch, (error, squares) in zip(spans, in_order(run, spans), strict=True):
        before.append(error)
        totals = sums.of(batch.piece)
        for name, values in squares.items():
            totals[name] = totals[name].add_(values) if name in totals else values
    positions = reader.share.count * (reader.length - 1)
    means = {name: values.div_(positions) for name, values in sums.total().items()}
    return joined(before), means


def store_errors(work: Workspace, layer: LayerSpec, errors: LayerInputs) -> None:
    """Store the gradients that `backward_layer` returned and delete the later layer's."""
    path = work.errors[layer.index + 1]
    file = work.open(path)
    done = {RESIDUAL, *_lent(layer.index)}
    rest = {n: file.rows(n, 0, i.shape[0]) for n, i in file.tensors.items() if n not in done}
    if errors.lent is not None:
        for name, values in zip(_lent(layer.source), errors.lent, strict=True):
            rest[name] = rest[name] + values if name in rest else values
    share = read_share(file)
    if errors.part is not None:
        write_rows(work.part_errors[layer.index], {RESIDUAL: errors.part}, share)
    write_rows(work.errors[layer.index], {RESIDUAL: errors.x, **rest}, share)
    shards.wait()
    path.unlink()


def _lent(index: int) -> tuple[str, str]:
    """Names of the gradients with respect to keys and values that a layer lends."""
    return f"{KEYS}.{index}", f"{VALUES}.{index}"


def table_information(work: Workspace) -> tuple[dict[str, Tensor], Tensor]:
    """Curvature (M, M) of the error of a row of table and head, and each row's share (V,) of it.

    A token is looked up about as often as it is likely. The curvature of the head is E[h hᵀ] over
    its inputs, that of the embedding E[g gᵀ] over the gradients with respect to embedded rows, and
    that of a table which is both is their sum. Requires the backward pass of all layers.
    """
    config, file = work.checkpoint.config, work.open(work.errors[0])
    stored = {name: file.rows(name, 0, info.shape[0]) for name, info in file.tensors.items()}
    looked_up = _second_moment(work, _embedding_errors(work, stored[RESIDUAL]))
    looked_up.mul_(config.embed_scale**2)
    if config.tied:
        return {TABLE: stored["gram"] + looked_up}, stored["share"]
    return {TABLE: looked_up, HEAD: stored["gram"]}, stored["share"]


def part_information(work: Workspace) -> list[Tensor]:
    """Curvature (P, P) of the error of each layer's part of a row of the per-layer table.

    Requires the backward pass of all layers.
    """
    factor = work.checkpoint.config.per_layer_scale**2 / 2  # of what is looked up, squared
    curvatures: list[Tensor] = []
    for path in work.part_errors:
        file = work.open(path)
        errors = file.rows(RESIDUAL, 0, file.tensors[RESIDUAL].shape[0])
        curvatures.append(_second_moment(work, errors).mul_(factor))
    return curvatures


def _second_moment(work: Workspace, errors: Tensor) -> Tensor:
    """E[g gᵀ] over gradients (B, T, N) of this rank's text and all others'.

    Without bos, because it is a single row with untypical gradients.
    """
    share, sums = _share(work), Sums()
    for piece in share.pieces:
        own = errors[piece.sequences.start : piece.sequences.stop, 1:].flatten(0, 1)
        sums.of(piece)[RESIDUAL] = own.T @ own
    return sums.total()[RESIDUAL].div_(share.count * (errors.shape[1] - 1))


def _share(work: Workspace) -> Share:
    return Share(len(work.calibration.tokens[:SEQUENCES]))


def _embedding_errors(work: Workspace, errors: Tensor) -> Tensor:
    """The gradient with respect to embeddings (B, T, M), from that of the first residual.

    Per-layer embeddings are computed from the embeddings too.
    """
    config, own = work.checkpoint.config, _share(work).own
    tokens = work.calibration.tokens[own.start : own.stop]
    if not config.per_layer:
        return errors
    weights = embedding_weights(config, work.weight, work.device)
    files = [work.open(path) for path in work.part_errors]

    def run(index: int) -> Tensor:
        span = index, index + 1
        ops = BatchOps(tokens[slice(*span)].to(work.device), config.rms_norm_eps)
        x = ops.embed(weights(TABLE), config.embed_scale).requires_grad_()
        with torch.enable_grad():
            parts = per_layer_parts(ops, config, weights, x)
            parts.backward(torch.cat([file.rows(RESIDUAL, *span) for file in files], -1))  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad

    return errors + torch.cat(list(in_order(run, range(len(errors)))))


def backward_bytes(work: Workspace) -> int:
    """Progress units left: bytes of weights still to be read, weighted by cost."""
    config, lowest = work.checkpoint.config, work.errors.lowest()
    if lowest is not None:
        return lowest * layer_backward_bytes(config)
    layers = len(config.kinds) * (layer_bytes(config) + layer_backward_bytes(config))
    return layers + 3 * 4 * config.vocab_size * config.hidden_size


def layer_backward_bytes(config: GemmaConfig) -> int:
    """Progress units of one layer's backward pass."""
    return _BACK * layer_bytes(config)


def information_peak_bytes(config: GemmaConfig, kind: str = HOST) -> int:
    """Upper bound of the backward pass's memory in bytes, on a kind of device."""
    threads, width = grain(kind).held, config.hidden_size
    table = 4 * (3 + threads) * SEQUENCES * LENGTH * width
    table += threads * 4 * 4 * _POSITIONS * BLOCK_ELEMENTS // width
    return max(table, *(layer_peak_bytes(config, layer, kind=kind) for layer in config.layers))


def layer_peak_bytes(
    config: GemmaConfig, layer: LayerSpec, squares: int = 0, kind: str = HOST
) -> int:
    """The same for one layer; `squares` is each thread's share of what is kept of the gradients."""
    threads = grain(kind).held
    shapes = [config.tensor_shapes()[name] for name in layer_names(config, layer.index)]
    matrices = [shape for shape in shapes if len(shape) == 2]
    outputs = 2 * sum(rows for rows, _ in matrices) + config.heads * LENGTH
    held = 8 * sum(rows * inputs for rows, inputs in matrices)
    held += 4 * sum({inputs**2 for _, inputs in matrices})
    # Gradients of the keys and values that layers lend, read and written.
    lenders = [config.layers[index] for index in config.lenders]
    lent = sum(2 * one.kv_heads * one.head_dim for one in lenders)
    held += 2 * 4 * SEQUENCES * LENGTH * (lent + config.per_layer)
    held += (HELD - 1) * squares
    return held + threads * (squares + 4 * 4 * _TOGETHER * LENGTH * outputs)


def _gradient(outputs: Tensor) -> Tensor:
    """The gradient of (B, T, N) outputs, without bos: (P, N)."""
    assert outputs.grad is not None
    return outputs.grad[:, 1:].flatten(0, 1)


def _draw_errors(work: Workspace, tick: Tick) -> dict[str, Tensor]:
    """Gradient of the sampled labels with respect to the last residual (B, T, M) of this rank's
    text, and the statistics of all ranks' that `table_information` needs.
    """
    config, share = work.checkpoint.config, _share(work)
    last = norm_before(config, len(config.kinds))
    gain = work.rows(last, 0, config.hidden_size)
    file = work.open(work.float_residuals.last)
    x = file.rows(RESIDUAL, 0, file.tensors[RESIDUAL].shape[0]).requires_grad_()
    with torch.enable_grad():
        y = rms_norm(x, gain, config.rms_norm_eps)
    h = y.detach()
    gradient, likely = _label_gradient(work, h, tick)
    y.backward(gradient)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    sums = Sums()
    for piece, row in zip(share.pieces, likely, strict=True):
        own = h[piece.sequences.start : piece.sequences.stop].flatten(0, 1)  # (P, M)
        sums.of(piece).update(gram=own.T @ own, share=row)
    positions = share.count * h.shape[1]
    return {RESIDUAL: x.grad, **{n: total.div_(positions) for n, total in sums.total().items()}}


def _label_gradient(work: Workspace, h: Tensor, tick: Tick) -> tuple[Tensor, Tensor]:
    """Gradient of sampled labels' log-likelihood with respect to the head's inputs (B, T, M), and
    each token's probability, summed over the positions of each of this rank's pieces: (pieces, V).

    The head is read twice, a block of rows at a time: the first pass samples each label's block,
    the second samples the label within its block.
    """
    config, share, length = work.checkpoint.config, _share(work), h.shape[1]
    parts = split(share, max(1, _POSITIONS // length))
    flat, places = h.flatten(0, 1), [slice(p.start * length, p.stop * length) for p in parts]
    inputs = [flat[place].to(product_dtype(h.device)) for place in places]
    spans = list(row_blocks(config.tensor_shapes()[config.head]))

    def weigh(span: tuple[int, int]) -> Tensor:
        rows = work.rows(config.head, *span).to(inputs[0].dtype)
        return torch.cat([_logits(part, rows, config)[0].logsumexp(-1) for part in inputs])

    # Copy the small results out: each would keep its block's memory alive.
    by_block = h.new_empty(len(flat), len(spans))  # log-likelihood of every block
    for index, weight in enumerate(in_order(weigh, spans)):
        by_block[:, index] = weight
        release_memory()
        tick("labels", 4 * (spans[index][1] - spans[index][0]) * config.hidden_size)
    totals = by_block.logsumexp(1, keepdim=True)
    seeds = [share.own.start + part.start for part in parts]  # the same for any number of ranks
    drawn = [
        _draw(by_block[place].softmax(1), _generator(seed, 0))
        for place, seed in zip(places, seeds, strict=True)
    ]

    def pull(block: int) -> tuple[Tensor, Tensor]:
        rows = work.rows(config.head, *spans[block]).to(inputs[0].dtype)
        pulled, sums = [], h.new_zeros(len(share.pieces), len(rows))
        for index, part in enumerate(parts):
            z, slope = _logits(inputs[index], rows, config)
            p = z.sub_(totals[places[index]]).exp_()
            sums[part.piece.index - share.pieces[0].index] += p.sum(0)
            inside = (drawn[index] == block).nonzero().flatten()
            if len(inside):
                p[inside, _draw(p[inside], _generator(seeds[index], 1 + block))] -= 1
            pulled.append(p.mul_(slope).to(rows.dtype) @ rows)
        return torch.cat(pulled), sums

    gradient, likely = torch.zeros_like(flat), h.new_empty(len(share.pieces), spans[-1][1])
    for span, (pulled, sums) in zip(spans, in_order(pull, range(len(spans))), strict=True):
        gradient += pulled
        likely[:, slice(*span)] = sums
        release_memory()
        tick("labels", 2 * 4 * (span[1] - span[0]) * config.hidden_size)
    return gradient.view_as(h), likely


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One column (P,) by the weights in each row (P, N), drawn on the host: the same everywhere."""
    return torch.multinomial(weights.cpu(), 1, generator=generator).flatten().to(weights.device)


def _logits(inputs: Tensor, rows: Tensor, config: GemmaConfig) -> tuple[Tensor, Tensor | float]:
    """Logits (P, n) of a block of tokens, and the slope of the softcap there."""
    y, cap = functional.linear(inputs, rows).float(), config.final_softcap
    z = soft_capped(y, cap)
    return z, 1.0 if cap is None else 1 - (z / cap).square()


def _generator(sequence: int, step: int) -> torch.Generator:
    """For a part of the text that begins with this sequence."""
    return torch.Generator().manual_seed(_SEED + (sequence << 32) + step)
