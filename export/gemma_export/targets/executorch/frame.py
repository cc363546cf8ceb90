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

from gemma_export.model.config import GemmaConfig, LayerSpec
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.executorch.named_data import NamedData
from gemma_export.targets.executorch.ops import (
    LAST,
    Delegate,
    Embed,
    Last,
    Step,
    Write,
    is_slots,
    mask_name,
    rope_name,
)
from gemma_export.targets.executorch.pte_tables import StandIn, stand_in
from gemma_export.targets.shared.traced import buffer_name
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.manifest import LayerCache

# Far below any score, but finite: in a row without visible slots, -inf - (-inf) would be NaN.
_HIDDEN = -1e9


class CachedFrame(nn.Module):
    """Caches and rope tables as buffers; masks and table rows for given positions."""

    def __init__(self, config: GemmaConfig, caches: Sequence[LayerCache], context: int) -> None:
        super().__init__()
        self.caches = caches
        self.owners = [layer for layer in config.layers if layer.owns_cache]
        self.sharers = [layer for layer in config.layers if not layer.owns_cache]
        for layer in self.owners:
            for part in ("key", "value"):
                empty = torch.zeros(caches[layer.index].shape[1:])  # (K, S, D)
                self.register_buffer(f"{part}_{layer.index}", empty, persistent=False)
        self._ropes: dict[str, str] = {}  # the buffer's name by that of the rope
        for layer in self.owners:
            if rope_name("cos", layer) in self._ropes:
                continue
            angle = rope_angles(layer.rope, range(context), layer.head_dim)
            for part, table in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
                name = self._ropes[rope_name(part, layer)] = f"{part}_{len(self._ropes) // 2}"
                self.register_buffer(name, torch.from_numpy(table).float())

    def positional(
        self, position: Tensor, used: Mapping[int, int], layers: Sequence[LayerSpec]
    ) -> dict[str, Tensor]:
        """Rope rows and masks of these layers for these positions, by their names.

        `used` maps a cache's number of slots to how many of them hold a token.
        """
        known: dict[str, Tensor] = {}
        for layer in layers:
            for part in ("cos", "sin"):
                name = rope_name(part, layer)
                if name not in known:
                    known[name] = self.get_buffer(self._ropes[name])[position]
            if mask_name(layer) not in known:
                cache, groups = self.caches[layer.source], layer.heads // layer.kv_heads
                mask = _mask(position, used[cache.slots], cache)
                known[mask_name(layer)] = mask.repeat(groups, 1)  # (G · T, S)
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
        self.stand_ins: list[StandIn] = []  # for `fill_in`, once the program is written
        for step in steps:
            if isinstance(step, Embed):
                self._register_table(step.table)
        delegates = [step for step in steps if isinstance(step, Delegate)]
        # The first delegate carries the named data of all of them.
        shared = [data.output(), *[None] * (len(delegates) - 1)]
        self._lowered = nn.ModuleList(map(_lower, delegates, shared))

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1]) + start  # (T,)
        sizes = {cache.slots for cache in self.caches}
        used = {slots: _count_used(position[-1], slots) for slots in sorted(sizes)}
        known = self.positional(position, used, self.owners)
        at_last = self.positional(position[-1:], used, self.sharers)
        known.update((LAST + name, value) for name, value in at_last.items())
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
                known[step.output] = self._look_up(step.table, tokens[0])
        return known[self._logits][None]

    def _register_table(self, table: StoredWeight) -> None:
        for part, (width, dtype) in _parts(table).items():
            one = stand_in(table.name + part, table.shape[0], width, dtype)
            self.stand_ins.append(one)
            self.register_buffer(buffer_name(one.key), one.row)

    def _look_up(self, table: StoredWeight, tokens: Tensor) -> Tensor:
        held = [self.get_buffer(buffer_name(table.name + part)) for part in _parts(table)]
        if table.format.is_float:
            return held[0][tokens]
        quantized = torch.ops.quantized_decomposed
        is_int8 = table.format.bits == 8
        rows = quantized.embedding_byte if is_int8 else quantized.embedding_4bit
        least = -128 if is_int8 else -8
        found: Tensor = rows.dtype(*held, None, least, -least - 1, tokens, dtype=torch.float32)
        return found


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


def _parts(table: StoredWeight) -> dict[str, tuple[int, torch.dtype]]:
    """Width and type of the table's parts in the named data, by the names of the parts."""
    fmt, width = table.format, table.shape[1]
    if fmt.is_float:
        return {"": (width, torch.float32)}
    if fmt.bits == 8:
        return {".codes": (width, torch.int8), ".scales": (width // fmt.group, torch.float32)}
    return {".codes": (width // 2, torch.uint8), ".scales": (width // fmt.group, torch.bfloat16)}


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
