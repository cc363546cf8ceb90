"""Distillation: trains the rounded model to reproduce the float32 model's probabilities.

Starting from calibrated rounding, codes, scales and norm gains are trained end to end to minimize
the KL to the float model on calibration text. Scales and gains follow the second stage of
EfficientQAT (https://arxiv.org/abs/2407.11062); codes are trained as in LLM-QAT
(https://arxiv.org/abs/2305.17888). Scales stay on the grid that all containers can store. Gradients
use the straight-through estimator for all rounding.

Memory holds one layer: the forward pass stores the residuals between layers, the backward pass runs
each layer again, and parameters are stored in files (`student`). B sequences, T tokens, M width,
C candidates, P = B · T.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import LayerSpec
from gemma_export.model.decoder import norm_before
from gemma_export.model.torch_ops import rms_norm
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.stream import (
    RESIDUAL,
    embed_sequence,
    layer_bytes,
    pass_layers,
    run_layer,
)
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.distill.candidates import Candidates, choose_candidates
from gemma_export.quantize.distill.student import Student

BATCH = 8  # sequences per step
PASSES = 1  # passes over the calibration text
_WARM = 10  # steps of warm-up
_SAVED_EVERY = 8  # steps between copies


def pass_teacher(work: Workspace, tick: Tick) -> None:
    """Run all sequences through the float model."""
    pass_layers(work, work.teacher_residuals, tick)


def teacher_bytes(work: Workspace) -> int:
    """Progress units: bytes of the layers in float32."""
    config = work.checkpoint.config
    return len(config.kinds) * layer_bytes(config)


def distill(work: Workspace, tick: Tick) -> None:
    """Train codes, scales and gains; writes the `distilled` files. `pass_teacher` must have run."""
    config = work.checkpoint.config
    student = Student(work)
    teacher = SafetensorsFile(work.teacher_residuals.last)
    final = norm_before(config, len(config.kinds))
    gain = work.checkpoint.rows(final, 0, config.hidden_size)
    candidates = choose_candidates(work, teacher, gain)
    steps = count_steps(work)
    for step in range(student.steps_done, steps):
        chosen = [(step * BATCH + i) % len(work.calibration.tokens) for i in range(BATCH)]
        share = _schedule(step, steps)
        _take_step(student, teacher, gain, candidates, chosen, share, step + 1)
        tick(f"step {step + 1}", 4 * config.parameters)
        if (step + 1) % _SAVED_EVERY == 0 and step + 1 < steps:
            student.save(step + 1)
    student.write()


def distill_bytes(work: Workspace) -> int:
    """Progress units: bytes of weights, once per step."""
    return 4 * count_steps(work) * work.checkpoint.config.parameters


def count_steps(work: Workspace) -> int:
    return max(1, PASSES * len(work.calibration.tokens) // BATCH)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine decay to 5 %."""
    fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1, (step + 1) / _WARM) * (0.05 + 0.95 * fall)


def _take_step(
    student: Student,
    teacher: SafetensorsFile,
    teacher_gain: Tensor,
    candidates: Candidates,
    chosen: list[int],
    share: float,
    step: int,
) -> None:
    config = student.config
    tokens, table = student.work.calibration.tokens, student.work.table()
    flows = [[embed_sequence(config, tokens[i], table)] for i in chosen]  # residuals by layer
    for layer in config.layers:
        weights = student.layer(layer.index)
        for flow, x in zip(flows, _forward(student, layer, weights, flows), strict=True):
            flow.append(x)
    last = norm_before(config, len(config.kinds))

    def judge(place: int) -> tuple[Tensor, Tensor]:
        residual = teacher.rows(RESIDUAL, chosen[place], chosen[place] + 1)
        target = rms_norm(residual, teacher_gain, config.rms_norm_eps)
        x = flows[place].pop().requires_grad_()
        gain = student.gain(student.last, last).requires_grad_()
        with torch.enable_grad():
            h = rms_norm(x, gain, config.rms_norm_eps)
            loss = candidates.divergence(target.flatten(0, 1), h.flatten(0, 1), student.dtype)
            (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert gain.grad is not None
        return x.grad, gain.grad

    judged = list(in_order(judge, range(len(chosen))))
    errors = [error for error, _ in judged]
    student.learn(student.last, {last: torch.stack([g for _, g in judged]).sum(0)}, share, step)
    for layer in reversed(config.layers):
        inputs = [flow.pop() for flow in flows]
        weights = student.layer(layer.index)
        errors, gradients = _backward(student, layer, weights, inputs, errors)
        student.learn(layer.index, gradients, share, step)


def _forward(
    student: Student, layer: LayerSpec, weights: Mapping[str, Tensor], flows: list[list[Tensor]]
) -> list[Tensor]:
    def run(flow: list[Tensor]) -> Tensor:
        ops = BatchOps(torch.empty(flow[-1].shape[:2]), student.config.rms_norm_eps)
        with torch.no_grad():
            return run_layer(ops, student.config, layer, hold(weights), flow[-1])

    return list(in_order(run, flows))


def _backward(
    student: Student,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    inputs: list[Tensor],
    errors: list[Tensor],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients for the layer's inputs, and for its weights, summed over sequences."""

    def run(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, error = pair[0].detach().requires_grad_(), pair[1]
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        ops = BatchOps(torch.empty(x.shape[:2]), student.config.rms_norm_eps)
        with torch.enable_grad():
            y = run_layer(ops, student.config, layer, hold(leaves), x)
            y.backward(error)  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad, {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}

    before: list[Tensor] = []
    total: dict[str, Tensor] = {}
    for error, gradients in in_order(run, list(zip(inputs, errors, strict=True))):
        before.append(error)
        for name, gradient in gradients.items():
            total[name] = total[name] + gradient if name in total else gradient.float()
    return before, total
