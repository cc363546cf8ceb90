"""Distillation: a rounded model learns from the float32 one what its logits should be.

After calibrated rounding, the scales of all groups and the gains of all norms are learned end to
end against the float model's distribution over calibration text (KL), codes as they are: the second
stage of EfficientQAT (https://arxiv.org/abs/2407.11062), and the norms besides, which are float32
in every container. Scales stay on the grid that containers share; gradients pass straight through.

Memory holds one layer: the way forward keeps the residuals between layers, the way back runs each
layer again. B sequences, T tokens, M width, C candidates, N rows, G groups per row, g inputs each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.batch_ops import BatchOps, hold, product_dtype
from gemma_export.checkpoint.safetensors import SafetensorsFile
from gemma_export.config import LayerSpec
from gemma_export.decoder import norm_before
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrator import Calibrator
from gemma_export.quantize.candidates import Candidates, choose_candidates
from gemma_export.quantize.pack import unpack
from gemma_export.quantize.round import shared_scale
from gemma_export.quantize.stream import (
    RESIDUAL,
    embed_sequence,
    layer_names,
    run_layer,
    write_tensors,
)

BATCH = 4  # sequences of one step
PASSES = 1  # over the calibration text
_RATE = 1e-3  # of one step at its highest: relative for scales, absolute for gains
_WARM = 5  # steps
_DECAY = (0.9, 0.95)  # of Adam's averages
_SAVED_EVERY = 8  # steps


@dataclass(slots=True)
class _Learned:
    """A tensor, how far it has come from where it began, and Adam's averages."""

    start: Tensor
    change: Tensor
    mean: Tensor
    square: Tensor

    def update(self, gradient: Tensor, rate: float, step: int) -> None:
        """Adam, https://arxiv.org/abs/1412.6980; steps count from 1."""
        first, second = _DECAY
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square(), 1 - second)
        size = rate * math.sqrt(1 - second**step) / (1 - first**step)
        self.change.sub_(self.mean / (self.square.sqrt() + 1e-12), alpha=size)


def distill(work: Calibrator, tick: Tick) -> None:
    """Learn scales and gains; leaves `distilled` files beside the calibrated ones.

    All sequences have passed the float model (`float`).
    """
    config = work.checkpoint.config
    student = _Student(work)
    teacher = SafetensorsFile(work.file("float", len(config.kinds)))
    final = norm_before(config, len(config.kinds))
    gain = work.checkpoint.rows(final, 0, config.hidden_size)
    candidates = choose_candidates(work, teacher, gain)
    steps = count_steps(work)
    for step in range(student.steps_done, steps):
        rate = _RATE * _schedule(step, steps)
        chosen = [(step * BATCH + i) % len(work.calibration.tokens) for i in range(BATCH)]
        _take_step(student, teacher, gain, candidates, chosen, rate, step + 1)
        tick(f"step {step + 1}", 4 * config.parameters)
        if (step + 1) % _SAVED_EVERY == 0:
            student.save(step + 1)
    student.write()
    work.file("learning").unlink(missing_ok=True)  # large, and of no more use


def distill_bytes(work: Calibrator) -> int:
    """Of weights that all steps pass by, for progress."""
    return 4 * count_steps(work) * work.checkpoint.config.parameters


def count_steps(work: Calibrator) -> int:
    return max(1, PASSES * len(work.calibration.tokens) // BATCH)


def _schedule(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a twentieth."""
    fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1, (step + 1) / _WARM) * (0.05 + 0.95 * fall)


class _Student:
    """The rounded model: codes in files, scales and gains in memory, where they are learned."""

    def __init__(self, work: Calibrator) -> None:
        self.work, self.config = work, work.checkpoint.config
        self.formats = work.formats()
        self.dtype = product_dtype()
        shapes = self.config.tensor_shapes()
        starts = {n: work.checkpoint.rows(n, 0, s[0]) for n, s in shapes.items() if len(s) == 1}
        for index in range(len(self.config.kinds)):
            file = SafetensorsFile(work.file("layer", index))
            for name in file.tensors:
                if name.endswith(".scales"):
                    starts[name] = file.rows(name, 0, file.tensors[name].shape[0]).float()
        state = work.file("learning")
        self._saved = SafetensorsFile(state) if state.exists() else None
        self.learned = {name: self._restore(name, start) for name, start in starts.items()}
        self.steps_done = 0
        if self._saved is not None:
            self.steps_done = int(self._saved.rows("step", 0, 1).item())

    def _restore(self, name: str, start: Tensor) -> _Learned:
        if self._saved is None:
            return _Learned(start, *(torch.zeros_like(start) for _ in range(3)))
        rows = len(start)
        parts = (self._saved.rows(f"{name}.{p}", 0, rows) for p in ("change", "mean", "square"))
        return _Learned(start, *parts)

    def save(self, step: int) -> None:
        tensors = {"step": torch.tensor([float(step)])}
        for name, learned in self.learned.items():
            tensors |= {f"{name}.{p}": getattr(learned, p) for p in ("change", "mean", "square")}
        write_tensors(self.work.file("learning"), tensors)

    def scale(self, name: str) -> Tensor:
        learned = self.learned[f"{name}.scales"]
        return shared_scale(learned.start * (1 + learned.change))

    def gain(self, name: str) -> Tensor:
        return self.learned[name].start + self.learned[name].change

    def steps_of(self, name: str, index: int) -> Tensor:
        """code - zero: (N, G, g) float32."""
        form, file = self.formats[name], SafetensorsFile(self.work.file("layer", index))
        rows, groups = file.tensors[f"{name}.scales"].shape
        codes = unpack(file.rows(f"{name}.codes", 0, rows), form.bits, groups * form.group)
        zero: Tensor | float = float(1 << (form.bits - 1))
        if form.asymmetric:
            zero = unpack(file.rows(f"{name}.zeros", 0, rows), form.bits, groups).float()[..., None]
        return codes.float().view(rows, groups, form.group) - zero

    def layer(self, index: int) -> dict[str, Tensor]:
        """All weights that a layer needs, matrices in the dtype of products."""
        names = [*layer_names(self.config, index), norm_before(self.config, index + 1)]
        return {name: self._weight(name, index) for name in names}

    def _weight(self, name: str, index: int) -> Tensor:
        if name in self.learned:
            return self.gain(name)
        if self.formats[name].is_float:
            file = SafetensorsFile(self.work.file("layer", index))
            return file.rows(name, 0, file.tensors[name].shape[0]).to(self.dtype)
        scaled = self.steps_of(name, index) * self.scale(name)[..., None]
        return scaled.flatten(1).to(self.dtype)

    def learn(self, index: int, gradients: Mapping[str, Tensor], rate: float, step: int) -> None:
        """One step of Adam for a layer, or for the final gain."""
        for name, gradient in gradients.items():
            if name in self.learned:
                self.learned[name].update(gradient.float(), rate, step)
            elif not self.formats[name].is_float:
                learned = self.learned[f"{name}.scales"]
                groups = gradient.float().view(*learned.start.shape, -1)
                per_scale = (groups * self.steps_of(name, index)).sum(-1)
                learned.update(per_scale * learned.start, rate, step)

    def write(self) -> None:
        """Files like calibration's own, with learned scales and gains in them."""
        for index in range(len(self.config.kinds)):
            file = SafetensorsFile(self.work.file("layer", index))
            tensors = {n: file.rows(n, 0, i.shape[0]) for n, i in file.tensors.items()}
            for name in layer_names(self.config, index):
                if name in self.learned:
                    tensors[name] = self.gain(name)
                elif f"{name}.scales" in tensors:
                    tensors[f"{name}.scales"] = self.scale(name).half()
            write_tensors(self.work.file("distilled", index), tensors)
        last = norm_before(self.config, len(self.config.kinds))
        write_tensors(self.work.file("final"), {last: self.gain(last)})


def _take_step(
    student: _Student,
    teacher: SafetensorsFile,
    teacher_gain: Tensor,
    candidates: Candidates,
    chosen: list[int],
    rate: float,
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
        target = functional.rms_norm(
            teacher.rows(RESIDUAL, chosen[place], chosen[place] + 1),
            (config.hidden_size,),
            1 + teacher_gain,
            config.rms_norm_eps,
        )
        x = flows[place].pop().requires_grad_()
        gain = student.gain(last).requires_grad_()
        with torch.enable_grad():
            h = functional.rms_norm(x, (config.hidden_size,), 1 + gain, config.rms_norm_eps)
            loss = candidates.divergence(target.flatten(0, 1), h.flatten(0, 1), student.dtype)
            (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert gain.grad is not None
        return x.grad, gain.grad

    judged = list(in_order(judge, range(len(chosen))))
    errors = [error for error, _ in judged]
    student.learn(-1, {last: torch.stack([g for _, g in judged]).sum(0)}, rate, step)
    for layer in reversed(config.layers):
        inputs = [flow.pop() for flow in flows]
        weights = student.layer(layer.index)
        errors, gradients = _backward(student, layer, weights, inputs, errors)
        student.learn(layer.index, gradients, rate, step)


def _forward(
    student: _Student, layer: LayerSpec, weights: Mapping[str, Tensor], flows: list[list[Tensor]]
) -> list[Tensor]:
    def run(flow: list[Tensor]) -> Tensor:
        ops = BatchOps(torch.empty(flow[-1].shape[:2]), student.config.rms_norm_eps)
        with torch.no_grad():
            return run_layer(ops, student.config, layer, hold(weights), flow[-1])

    return list(in_order(run, flows))


def _backward(
    student: _Student,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    inputs: list[Tensor],
    errors: list[Tensor],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of the loss by the layer's inputs, and by its weights, summed over sequences."""

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
