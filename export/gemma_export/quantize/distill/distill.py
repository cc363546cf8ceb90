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
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import LayerSpec
from gemma_export.model.decoder import norm_before
from gemma_export.model.torch_ops import rms_norm
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.flow import (
    RESIDUAL,
    KeysValues,
    LayerInputs,
    embed,
    read_share,
)
from gemma_export.quantize.calibrate.layer_weights import layer_bytes
from gemma_export.quantize.calibrate.stream import pass_layers, run_layer
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.distill.candidates import Candidates, choose_candidates
from gemma_export.quantize.distill.student import Student
from gemma_export.shards import PIECES, Share, Sums

BATCH = PIECES  # most sequences per step: one of each piece
PASSES = 1  # passes over the calibration text
_WARM = 10  # steps of warm-up
_SAVED_EVERY = 8  # steps between copies


def pass_teacher(work: Workspace, tick: Tick) -> None:
    """Run all sequences through the float model, each rank its own."""
    pass_layers(work, work.teacher_residuals, tick)


def teacher_bytes(work: Workspace) -> int:
    """Progress units: bytes of the layers in float32."""
    config = work.checkpoint.config
    return len(config.kinds) * layer_bytes(config)


def distill(work: Workspace, tick: Tick) -> None:
    """Train codes, scales and gains; writes the `distilled` files. `pass_teacher` must have run."""
    config = work.checkpoint.config
    student = Student(work)
    teacher = work.open(work.teacher_residuals.last)
    final = norm_before(config, len(config.kinds))
    gain = work.rows(final, 0, config.hidden_size)
    candidates = choose_candidates(work, teacher, gain)
    steps = count_steps(len(work.calibration.tokens))
    for step in range(student.steps_done, steps):
        _take_step(student, teacher, gain, candidates, _schedule(step, steps), step)
        tick(f"step {step + 1}", 4 * config.parameters)
        if (step + 1) % _SAVED_EVERY == 0 and step + 1 < steps:
            shards.from_first(partial(student.save, step + 1))
    shards.from_first(student.write)


def distill_bytes(work: Workspace) -> int:
    """Progress units: bytes of weights, once per step."""
    return 4 * count_steps(len(work.calibration.tokens)) * work.checkpoint.config.parameters


def count_steps(sequences: int) -> int:
    """Steps of distillation over a text of so many sequences."""
    return max(1, PASSES * sequences // Share(sequences).count_pieces)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine decay to 5 %."""
    fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1, (step + 1) / _WARM) * (0.05 + 0.95 * fall)


def _take_step(
    student: Student,
    teacher: SafetensorsFile,
    teacher_gain: Tensor,
    candidates: Candidates,
    rate: float,
    step: int,
) -> None:
    """Learn from a sequence of each piece; `rate` is a share of the learning rates."""
    config, text = student.config, read_share(teacher)
    tokens = student.work.calibration.tokens[text.own.start : text.own.stop]
    chosen = [piece.sequences[step % len(piece.sequences)] for piece in text.pieces]
    flows = [_Flow.of(student, tokens[i : i + 1]) for i in chosen]
    for layer in config.layers:
        _forward(student, layer, flows)
    last = norm_before(config, len(config.kinds))

    def judge(place: int) -> tuple[Tensor, Tensor]:
        residual = teacher.rows(RESIDUAL, chosen[place], chosen[place] + 1)
        target = rms_norm(residual, teacher_gain, config.rms_norm_eps)
        x = flows[place].residuals.pop().requires_grad_()
        gain = student.gain(student.last, last).requires_grad_()
        with torch.enable_grad():
            h = rms_norm(x, gain, config.rms_norm_eps)
            loss = candidates.divergence(target.flatten(0, 1), h.flatten(0, 1), student.dtype)
            (loss / text.count_pieces).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert gain.grad is not None
        return x.grad, gain.grad

    judged = list(in_order(judge, range(len(chosen))))
    sums = Sums()
    for piece, flow, (error, gradient) in zip(text.pieces, flows, judged, strict=True):
        flow.error = error
        sums.of(piece)[last] = gradient
    student.learn(student.last, sums.total(), rate, step + 1)
    for layer in reversed(config.layers):
        student.learn(layer.index, _backward(student, layer, flows, text), rate, step + 1)


@dataclass(slots=True)
class _Flow:
    """What a sequence is between layers, first forward and then backward."""

    residuals: list[Tensor]  # (1, T, M) before each layer so far
    parts: tuple[Tensor, ...]  # (1, T, P) per-layer embeddings, by layer
    lent: dict[int, KeysValues] = field(default_factory=dict)  # by the layer that lends them
    error: Tensor | None = None  # the gradient with respect to the residual
    lent_errors: dict[int, KeysValues] = field(default_factory=dict)

    @classmethod
    def of(cls, student: Student, tokens: Tensor) -> "_Flow":
        with torch.no_grad():
            x, parts = embed(student.config, tokens.to(student.device), student.embedding)
        return cls([x], parts)

    def inputs(self, layer: LayerSpec, x: Tensor) -> LayerInputs:
        part = self.parts[layer.index] if self.parts else None
        return LayerInputs(x, part, None if layer.owns_cache else self.lent[layer.source])

    def go_back(self, layer: LayerSpec, gradients: LayerInputs) -> None:
        """Take the gradients with respect to what a layer read."""
        self.error = gradients.x
        if gradients.lent is not None:
            later = self.lent_errors.get(layer.source)
            keys, values = gradients.lent
            if later is not None:
                keys, values = keys + later[0], values + later[1]
            self.lent_errors[layer.source] = keys, values


def _forward(student: Student, layer: LayerSpec, flows: list[_Flow]) -> None:
    """Run all sequences through a layer."""
    held, lends = hold(student.layer(layer.index)), layer.index in student.config.lenders

    def run(flow: _Flow) -> None:
        inputs = flow.inputs(layer, flow.residuals[-1])
        ops = BatchOps(torch.empty(inputs.x.shape[:2]), student.config.rms_norm_eps)
        with torch.no_grad():
            flow.residuals.append(run_layer(ops, student.config, layer, held, inputs))
        if lends:
            flow.lent[layer.index] = ops.lent[layer.kind]

    for _ in in_order(run, flows):
        pass


def _backward(
    student: Student, layer: LayerSpec, flows: list[_Flow], text: Share
) -> dict[str, Tensor]:
    """Run all sequences back through a layer; returns its weights' gradients, summed over those of
    all ranks.
    """
    weights, lends = student.layer(layer.index), layer.index in student.config.lenders

    def run(flow: _Flow) -> dict[str, Tensor]:
        assert flow.error is not None
        inputs = flow.inputs(layer, flow.residuals.pop()).tracked()
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        ops = BatchOps(torch.empty(inputs.x.shape[:2]), student.config.rms_norm_eps)
        with torch.enable_grad():
            y = run_layer(ops, student.config, layer, hold(leaves), inputs)
            errors = (flow.error, *(flow.lent_errors.pop(layer.index) if lends else ()))
            torch.autograd.backward((y, *ops.lent[layer.kind])[: len(errors)], errors)
        flow.go_back(layer, inputs.gradients())
        return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}

    sums = Sums()
    for piece, gradients in zip(text.pieces, in_order(run, flows), strict=True):
        sums.of(piece).update((name, gradient.float()) for name, gradient in gradients.items())
    return sums.total()
