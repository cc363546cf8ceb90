"""The module around the delegates, for torch.export: positions, masks, caches.

Shapes: T new tokens, M width, K kv heads, S slots, D head size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn

from gemma_export.model.config import GemmaConfig
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.executorch.named_data import NamedData
from gemma_export.targets.executorch.ops import (
    Delegate,
    Embed,
    Last,
    Step,
    Write,
    is_slots,
    mask_name,
    rope_name,
)
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.manifest import LayerCache

# Far below any score, but finite: in a row without visible slots, -inf - (-inf) would be NaN.
_HIDDEN = -1e9


class CachedFrame(nn.Module):
    """Caches and rope tables as buffers; masks and table rows for given positions."""

    def __init__(self, config: GemmaConfig, caches: Sequence[LayerCache], context: int) -> None:
        super().__init__()
        self.caches = caches
        self.groups = config.heads // config.kv_heads
        self.ropes = list(dict.fromkeys(config.ropes.values()))
        for index, cache in enumerate(caches):
            for part in ("key", "value"):
                empty = torch.zeros(cache.shape[1:])  # (K, S, D)
                self.register_buffer(f"{part}_{index}", empty, persistent=False)
        for index, rope in enumerate(self.ropes):
            angle = rope_angles(rope, range(context), config.head_dim)
            for part, table in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
                self.register_buffer(f"{part}_{index}", torch.from_numpy(table).float())

    def positional(self, position: Tensor, used: Mapping[int, int]) -> dict[str, Tensor]:
        """Rope rows and masks for these positions, by the names that the steps use.

        `used` maps a cache's number of slots to how many of them hold a token.
        """
        known: dict[str, Tensor] = {}
        for index, rope in enumerate(self.ropes):
            for part in ("cos", "sin"):
                known[rope_name(part, rope)] = self.get_buffer(f"{part}_{index}")[position]
        for cache in self.caches:
            if mask_name(cache.window) not in known:
                mask = _mask(position, used[cache.slots], cache)
                known[mask_name(cache.window)] = mask.repeat(self.groups, 1)  # (G · T, S)
        return known

    def write(self, layer: int, key: Tensor, value: Tensor, position: Tensor) -> list[Tensor]:
        """Write keys and values, (K, T, D) each, into a layer's caches; returns the caches."""
        slot = torch.remainder(position, self.caches[layer].slots)
        held = [self.get_buffer(f"{part}_{layer}") for part in ("key", "value")]
        for cache, new in zip(held, (key, value), strict=True):
            cache.index_copy_(1, slot, new)
        return held


class Frame(CachedFrame):
    """From tokens (1, T) and the first one's position (1,) to the last one's logits (1, 1, V)."""

    def __init__(
        self,
        config: GemmaConfig,
        caches: Sequence[LayerCache],
        context: int,
        steps: Sequence[Step],
        logits: str,
        data: NamedData,
    ) -> None:
        super().__init__(config, caches, context)
        self._steps = steps
        self._logits = logits
        for step in steps:
            if isinstance(step, Embed):
                _register_table(self, step.table, data)
        delegates = [step for step in steps if isinstance(step, Delegate)]
        # The first delegate carries the named data of all of them.
        shared = [data.output(), *[None] * (len(delegates) - 1)]
        self._lowered = nn.ModuleList(map(_lower, delegates, shared))

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1]) + start  # (T,)
        sizes = {cache.slots for cache in self.caches}
        used = {slots: _count_used(position[-1], slots) for slots in sorted(sizes)}
        known = self.positional(position, used)
        delegates = iter(self._lowered)
        for step in self._steps:
            if isinstance(step, Delegate):
                results = executorch_call_delegate(
                    next(delegates), *[known[name] for name in step.inputs]
                )
                known.update(zip(step.outputs, results, strict=True))
            elif isinstance(step, Write):
                held = self.write(step.layer, known[step.key], known[step.value], position)
                seen = used[self.caches[step.layer].slots]
                for part, cache in zip(("key", "value"), held, strict=True):
                    known[f"{part} {step.layer}"] = cache[:, :seen]
            elif isinstance(step, Last):
                known[step.output] = known[step.input][-1:]
            else:
                known[step.output] = _look_up(self, step.table, tokens[0])
        return known[self._logits][None]


def _count_used(last: Tensor, slots: int) -> int:
    """How many slots hold a token once position `last` is written, as a symbolic tensor size."""
    used = torch.clamp(last + 1, max=slots).item()
    torch._check(used >= 1)  # type: ignore[no-untyped-call]
    torch._check(used <= slots)  # type: ignore[no-untyped-call]
    return cast(int, used)


def _mask(position: Tensor, used: int, cache: LayerCache) -> Tensor:
    """The attention mask of each token over the slots, from positions alone: (T, used).

    Slot s holds the latest position p with p mod S = s, or nothing if that is below 0.
    """
    last = position[-1:]
    held = last - torch.remainder(last - torch.arange(used), cache.slots)  # (used,)
    seen = (held <= position[:, None]) & (held >= 0)
    if cache.window is not None:
        seen = seen & (held > position[:, None] - cache.window)
    return torch.where(seen, 0.0, _HIDDEN)


def _register_table(frame: nn.Module, table: StoredWeight, data: NamedData) -> None:
    """Register the table as a constant. The head holds the same bytes: see `share_constant`."""
    rows, width = table.shape
    if table.format.is_float:
        frame.register_buffer("table", data.tensor(table.name, (rows, width), torch.float32))
        return
    fmt, types = table.format, (torch.uint8, torch.bfloat16)
    if fmt.bits == 8:
        types = (torch.int8, torch.float32)
    codes = data.tensor(f"{table.name}.codes", (rows, width * fmt.bits // 8), types[0])
    scales = data.tensor(f"{table.name}.scales", (rows, width // fmt.group), types[1]).float()
    frame.register_buffer("table", codes)
    frame.register_buffer("table_scales", scales)


def _look_up(frame: nn.Module, table: StoredWeight, tokens: Tensor) -> Tensor:
    codes = frame.get_buffer("table")
    if table.format.is_float:
        return codes[tokens]
    scales, quantized = frame.get_buffer("table_scales"), torch.ops.quantized_decomposed
    if table.format.bits == 8:
        wide: Tensor = quantized.embedding_byte(codes, scales, None, -128, 127, tokens)
        return wide
    rows: Tensor = quantized.embedding_4bit(codes, scales, None, -8, 7, tokens)
    return rows


def _lower(delegate: Delegate, data: NamedDataStoreOutput | None) -> LoweredBackendModule:
    return LoweredBackendModule(
        _Outputs(delegate), "XnnpackBackend", delegate.graph.serialize(), [], data
    )


class _Outputs:
    """Replaces a delegate's original program, which torch.export asks for output shapes only.

    The token dimension is the second last: the first of a matrix, the second of heads (H, T, D).
    """

    def __init__(self, delegate: Delegate) -> None:
        self._names, self._shapes = delegate.inputs, delegate.graph.output_shapes
        self.graph = torch.fx.Graph()
        self.graph.output(())

    def module(self) -> Callable[..., tuple[Tensor, ...]]:
        return self._run

    def _run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = zip(self._names, inputs, strict=True)
        tokens = next(x.shape[-2] for name, x in named if not is_slots(name))
        return tuple(
            inputs[0].new_empty((*shape[:-2], tokens, shape[-1])) for shape in self._shapes
        )
