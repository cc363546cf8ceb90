"""Finds column factors that make rounding a matrix and its inputs lose least.

Runtimes round inputs to int8 in the groups of the weights, so one large channel costs its whole
group its precision. A factor f of a column divides its input. The factors minimize an estimate of
the squared error of the products,

    Σ_g Σ_{k in g} E[min(s² / 12, x²)] E[w²] + E[min(t² / 12, w²)] E[x²]

over groups g, with inputs x / f, weights w · f, and their steps s = max |x| / 127 and t in a group:
uniform rounding has the variance s² / 12, and no error exceeds the value. Adam finds them.

N rows, K columns, P positions, M width.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.formats.format import Format
from gemma_export.model.config import DOWN, GATE_UP, GemmaConfig, LayerSpec
from gemma_export.model.decoder import norm_before
from gemma_export.model.torch_ops import rms_norm
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.arrange import sample_rows
from gemma_export.quantize.calibrate.flow import (
    RESIDUAL,
    batches,
    read_share,
    start_flow,
    write_shared,
)
from gemma_export.quantize.calibrate.layer_weights import layer_bytes, load_layer
from gemma_export.quantize.calibrate.stream import advance_flow, sample_flow, sample_positions
from gemma_export.quantize.calibrate.workspace import Workspace, curvature_name
from gemma_export.shards import Sums

SEQUENCES = 128
POSITIONS = 1024  # inputs of a matrix that its factors are fitted to
ROWS = 256  # rows of the matrix that they are fitted to
STEPS = 60
_RATE = 0.1  # of the first step; it falls to 0
_SEED = 0
_INPUT_LEVELS = 127  # of int8
_MOST = 1024.0  # factors lie in [1 / _MOST, _MOST]: so large a row still fits float16 scales


def smooth(work: Workspace, tick: Tick) -> None:
    """Find the factors of all matrices that the recipe smooths, from the float model's activations.

    Also the curvature of a smooth or weighted head. Writes `smoothing`, one file per layer and one
    for the head, and `head_curvature`. Resumes after the last layer.
    """
    config, residuals = work.checkpoint.config, work.smoothing_residuals
    formats = work.formats()
    first = shards.resumed_at(residuals.lowest(), max)
    if first is None:
        start_flow(residuals, config, work.calibration.tokens[:SEQUENCES], work.weight)
    for layer in config.layers[first or 0 :]:
        weights = load_layer(work.checkpoint, layer.index, work.device)
        together, samples = list(_smoothed_together(work, layer)), {}
        if together:
            samples = sample_flow(residuals, config, layer, weights, POSITIONS)
        else:
            advance_flow(residuals, config, layer, weights)
        factors: dict[str, Tensor] = {}
        for names in together:
            rows = torch.cat([weights[name] for name in names])
            find = partial(smoothing_factors, samples[names[0]], _some(rows), formats[names[0]])
            factors |= dict.fromkeys(names, shards.from_first(find))
        write_shared(work.smoothing[layer.index], factors)
        shards.wait()
        residuals[layer.index].unlink()
        tick(f"layer {layer.index}", layer_bytes(config))
    factors, gram = _smooth_head(work)
    if gram is not None:
        write_shared(work.head_curvature, {curvature_name(config.head): gram})
    write_shared(work.smoothing.last, factors)
    shards.wait()
    residuals.delete()


def smooth_bytes(work: Workspace) -> int:
    """Progress units left: bytes of layers."""
    config = work.checkpoint.config
    done = work.smoothing_residuals.lowest() or 0
    return (len(config.kinds) - done) * layer_bytes(config)


def smooth_peak_bytes(config: GemmaConfig) -> int:
    """Upper bound of the memory that fitting takes, in bytes, without a layer and its batches."""
    return 4 * 8 * (POSITIONS + ROWS) * config.widest_input


def _smoothed_together(work: Workspace, layer: LayerSpec) -> Iterator[list[str]]:
    """The layer's matrices to be smoothed; those with the same inputs are together."""
    for parts in (layer.qkv, GATE_UP, DOWN):
        names = [f"model.layers.{layer.index}.{part}.weight" for part in parts]
        if any(map(work.recipe.smooths, names)):
            yield names


def _smooth_head(work: Workspace) -> tuple[dict[str, Tensor], Tensor | None]:
    """The head's factors by its name, and the Gram matrix (M, M) of its inputs divided by them.

    No factors if the recipe doesn't smooth the head, and nothing if it doesn't weigh it either.
    """
    config = work.checkpoint.config
    name, last = config.head, norm_before(config, len(config.kinds))
    is_smooth = work.recipe.smooths(name)
    if not is_smooth and work.recipe.rule(name).rounding != "weighted":
        return {}, None
    file = work.open(work.smoothing_residuals.last)
    gain = work.rows(last, 0, config.hidden_size)
    share, (_, length, width) = read_share(file), file.tensors[RESIDUAL].shape
    samples, sums = [], Sums()
    for batch in batches(config, length, share, work.device):
        h = rms_norm(file.rows(RESIDUAL, *batch.span), gain, config.rms_norm_eps)
        if is_smooth:
            samples.append(sample_positions(h, share.count, POSITIONS))
        body = h[:, 1:].flatten(0, 1)
        sums.of(batch.piece).setdefault(name, gain.new_zeros(width, width)).addmm_(body.T, body)
    gram = sums.total()[name].div_(share.count * (length - 1))
    if not is_smooth:
        return {}, gram
    rows = sample_rows(work.checkpoint, name).to(work.device)
    inputs, fmt = shards.gathered(torch.cat(samples)), work.formats()[name]
    factors = shards.from_first(lambda: smoothing_factors(inputs, rows, fmt)).to(work.device)
    return {name: factors}, gram.div_(factors[:, None]).div_(factors)


def _some(rows: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(_SEED)
    return rows[torch.randperm(len(rows), generator=draw)[:ROWS].to(rows.device)]


def smoothing_factors(inputs: Tensor, rows: Tensor, fmt: Format) -> Tensor:
    """(K,) factors with geometric mean 1, from inputs (P, K) and rows (N, K) of the weights."""
    width = inputs.shape[1]
    group, levels = width if fmt.per_channel else fmt.group, (1 << (fmt.bits - 1)) - 1
    sizes = [values.square().mean(0).clamp_(min=1e-20).log() for values in (inputs, rows)]
    log = ((sizes[0] - sizes[1]) / 4).requires_grad_()  # SmoothQuant's factors, a good start
    adam = torch.optim.Adam([log], _RATE)
    with torch.enable_grad():
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = _RATE * (1 - step / STEPS)
            factors = log.exp()
            x, w = (inputs / factors).view(-1, width // group, group), (rows * factors)
            loss = _loss(x, w.view(-1, width // group, group), levels)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    log = log.detach()
    return (log - log.mean()).exp_().clamp_(1 / _MOST, _MOST)


def _loss(x: Tensor, w: Tensor, levels: int) -> Tensor:
    """The estimate above, for inputs (P, G, g) and rows (N, G, g)."""
    of_inputs = _variance(x, _INPUT_LEVELS) * w.square().mean(0)
    return (of_inputs + _variance(w, levels) * x.square().mean(0)).sum()


def _variance(values: Tensor, levels: int) -> Tensor:
    """(G, g) mean variance of rounding values (N, G, g) in their groups."""
    step = values.abs().amax(-1, keepdim=True) / levels
    return torch.minimum(step.square() / 12, values.square()).mean(0)
