"""The trained model: codes, scales and gains in one file per layer, updated in place.

A 4-bit code is trained as a latent, a float that rounds to the code. Latents start near the middle
of their code's interval, so a code changes only if gradients agree over many steps. 8-bit codes are
not trained. Each weight takes 12 bytes in files (the latent and Adam's averages), and another 12 in
the copy from which interrupted work resumes.

N rows, K inputs, G groups per row, g inputs per group.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.computing import product_dtype
from gemma_export.formats.codes import pack, unpack
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import is_gain
from gemma_export.model.decoder import norm_before
from gemma_export.parallel import in_order
from gemma_export.quantize.calibrate.balance import balanced
from gemma_export.quantize.calibrate.flow import embedding_weights, write_tensors
from gemma_export.quantize.calibrate.layer_weights import layer_names
from gemma_export.quantize.calibrate.layers import FACTORS
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.round import shared_scale

RATE = 1e-3  # highest learning rate: relative for scales, absolute for gains
CODE_RATE = 2e-2  # highest learning rate of latents; codes are 1 apart
_DECAY = (0.9, 0.95)  # Adam's β₁ and β₂
_AVERAGES = ("mean", "square")
_LEAD = 0.25  # largest initial distance of a latent from its code


class Student:
    """Parameters in files, by layer index; the index after the last layer has the final gain."""

    def __init__(self, work: Workspace) -> None:
        self.work, self.config = work, work.checkpoint.config
        self.device = work.device
        self.formats, self.dtype = work.formats(), product_dtype(work.device)
        self.last = len(self.config.kinds)
        # Never trained.
        self.embedding = embedding_weights(self.config, work.rounded, self.device)
        self.steps_done = shards.from_first(self._resume)

    def save(self, step: int) -> None:
        """Save a copy of all parameters after this step, and delete older copies."""
        older, partial = self.work.saved(), self.work.folder / "saving"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.work.learning, partial)
        partial.rename(self.work.saved_at(step))
        for path in older:
            shutil.rmtree(path)

    def layer(self, index: int) -> dict[str, Tensor]:
        """All weights that a layer needs; matrices in the dtype used for matrix products."""
        file = self._learned(index)
        names = layer_names(self.config, index)
        weights = in_order(lambda name: self._weight(file, name, index), names)
        then = norm_before(self.config, index + 1)
        return {**dict(zip(names, weights, strict=True)), then: self.gain(index + 1, then)}

    def gain(self, index: int, name: str) -> Tensor:
        file = self._learned(index)
        return file.rows(name, 0, file.tensors[name].shape[0])

    def learn(self, index: int, gradients: Mapping[str, Tensor], share: float, step: int) -> None:
        """One step of Adam, with gradients by weight name. `share` scales the learning rates.

        Each rank updates some of the weights.
        """
        file = self._learned(index)

        def update(name: str) -> None:
            gradient = gradients[name].float()
            if gradient.dim() == 1:
                _update(file, name, gradient, share * RATE, step)
                return
            start, steps = self._scales(index, name), self._steps(file, name, index)
            groups = gradient.view_as(steps)
            per_scale = (groups * steps).sum(-1) * start
            if name in file.tensors:
                scale = self._scale(file, name, index)
                latents = groups.mul_(scale[..., None]).view_as(gradient)
                _update(file, name, latents, share * CODE_RATE, step)
            _update(file, f"{name}.scales", per_scale, share * RATE, step)

        learned = [n for n in gradients if n in file.tensors or f"{n}.scales" in file.tensors]
        for _ in shards.dealt(update, learned):
            pass
        shards.wait()

    def write(self) -> None:
        """Write the layers' files as calibration does, with trained codes, scales and gains."""
        for index in range(self.last):
            source, learned = self._rounded(index), self._learned(index)
            tensors = {n: source.rows(n, 0, i.shape[0]) for n, i in source.tensors.items()}
            for name in layer_names(self.config, index):
                if f"{name}.scales" in learned.tensors:
                    tensors[f"{name}.scales"] = self._scale(learned, name, index).half()
                    if name in learned.tensors:
                        tensors[f"{name}.codes"] = self._codes(learned, name, index)
                elif name in learned.tensors:
                    tensors[name] = self.gain(index, name)
            write_tensors(self.work.distilled_layers[index], tensors)
        name = norm_before(self.config, self.last)
        write_tensors(self.work.distilled_gain, {name: self.gain(self.last, name)})
        for path in (self.work.learning, *self.work.saved()):  # large and no longer needed
            shutil.rmtree(path)

    def _resume(self) -> int:
        """Restore the newest copy, or write the initial files. Returns the number of steps done."""
        shutil.rmtree(self.work.learning, ignore_errors=True)
        if saved := max(self.work.saved(), default=None):
            shutil.copytree(saved, self.work.learning)
            return int(saved.name.removeprefix("saved-"))
        for index in range(self.last + 1):
            starts = self._starts(index)
            averages = {
                f"{n}.{a}": torch.zeros_like(t) for n, t in starts.items() for a in _AVERAGES
            }
            write_tensors(self._path(index), {**starts, **averages})
        return 0

    def _starts(self, index: int) -> dict[str, Tensor]:
        """Initial parameters: gains, relative changes of scales (0), latents of 4-bit codes."""
        last = norm_before(self.config, self.last)
        names = [last] if index == self.last else layer_names(self.config, index)
        starts: dict[str, Tensor] = {}
        for name in names:
            if is_gain(name):
                starts[name] = self._float(index, name)
            elif name in self.formats and not self.formats[name].is_float:
                starts[f"{name}.scales"] = torch.zeros_like(self._scales(index, name))
                if self.formats[name].bits == 4:
                    starts[name] = self._latents(index, name)
        return starts

    def _latents(self, index: int, name: str) -> Tensor:
        """(N, K) initial latents: the float weights in steps, kept within _LEAD of their codes."""
        steps = self._kept_steps(index, name)
        weights = self._float(index, name).view_as(steps)
        exact = weights / self._scales(index, name)[..., None]
        return exact.clamp_(steps - _LEAD, steps + _LEAD).flatten(1)

    def _float(self, index: int, name: str) -> Tensor:
        """The checkpoint's weight, balanced as calibration balanced it."""
        values = self.work.rows(name, 0, self.config.tensor_shapes()[name][0])
        if index == self.last:
            return values
        file, end = self._rounded(index), f".{FACTORS}"
        names = [n for n in file.tensors if n.endswith(end)]
        factors = {n.removesuffix(end): file.rows(n, 0, file.tensors[n].shape[0]) for n in names}
        return balanced(name, values, factors)

    def _weight(self, file: SafetensorsFile, name: str, index: int) -> Tensor:
        if is_gain(name):
            return self.gain(index, name)
        if name not in self.formats or self.formats[name].is_float:  # layer scalars, float matrices
            source = self._rounded(index)
            return source.rows(name, 0, source.tensors[name].shape[0]).to(self.dtype)
        steps, scale = self._steps(file, name, index), self._scale(file, name, index)
        return steps.mul_(scale[..., None]).flatten(1).to(self.dtype)

    def _scales(self, index: int, name: str) -> Tensor:
        """(N, G) scales from calibration."""
        file = self._rounded(index)
        return file.rows(f"{name}.scales", 0, file.tensors[f"{name}.scales"].shape[0]).float()

    def _scale(self, file: SafetensorsFile, name: str, index: int) -> Tensor:
        start = self._scales(index, name)
        return shared_scale(start * (1 + file.rows(f"{name}.scales", 0, len(start))))

    def _steps(self, file: SafetensorsFile, name: str, index: int) -> Tensor:
        """(N, G, g) float32: code - zero, from the latents if codes are trained."""
        if name not in file.tensors:
            return self._kept_steps(index, name)
        fmt, zero = self.formats[name], self._zeros(index, name)
        rows = file.tensors[name].shape[0]
        latents = file.rows(name, 0, rows).view(rows, -1, fmt.group)
        return latents.round_().clamp_(-zero, (1 << fmt.bits) - 1 - zero)

    def _kept_steps(self, index: int, name: str) -> Tensor:
        """(N, G, g) float32: code - zero, from calibration."""
        fmt, source = self.formats[name], self._rounded(index)
        rows, groups = source.tensors[f"{name}.scales"].shape
        codes = unpack(source.rows(f"{name}.codes", 0, rows), fmt.bits, groups * fmt.group)
        return codes.float().view(rows, groups, fmt.group) - self._zeros(index, name)

    def _zeros(self, index: int, name: str) -> Tensor:
        """(N, G, 1) float32 zero points."""
        fmt, source = self.formats[name], self._rounded(index)
        rows, groups = source.tensors[f"{name}.scales"].shape
        if not fmt.asymmetric:
            middle = float(1 << (fmt.bits - 1))
            return torch.full((rows, groups, 1), middle, device=self.device)
        zeros = unpack(source.rows(f"{name}.zeros", 0, rows), fmt.bits, groups)
        return zeros.float()[..., None]

    def _codes(self, file: SafetensorsFile, name: str, index: int) -> Tensor:
        codes = self._steps(file, name, index).add_(self._zeros(index, name)).to(torch.uint8)
        return pack(codes.flatten(1), self.formats[name].bits)

    def _rounded(self, index: int) -> SafetensorsFile:
        return self.work.open(self.work.rounded_layers[index])

    def _learned(self, index: int) -> SafetensorsFile:
        return self.work.open(self._path(index))

    def _path(self, index: int) -> Path:
        return self.work.learning / f"{index:02d}.safetensors"


def _update(file: SafetensorsFile, name: str, gradient: Tensor, rate: float, step: int) -> None:
    """One step of Adam (https://arxiv.org/abs/1412.6980); `step` counts from 1."""
    first, second = _DECAY
    parts = (name, *(f"{name}.{average}" for average in _AVERAGES))
    value, mean, square = (file.rows(part, 0, len(gradient)) for part in parts)
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    size = rate * math.sqrt(1 - second**step) / (1 - first**step)
    value.addcdiv_(mean, square.sqrt().add_(1e-12), value=-size)
    for part, content in zip(parts, (value, mean, square), strict=True):
        file.overwrite(part, content)
