"""Counted work against the work that torch does, and what `--plan` makes of it."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gemma_export import parallel
from gemma_export.checkpoint.random import RandomCheckpoint
from gemma_export.computing import CPU
from gemma_export.model.config import GemmaConfig
from gemma_export.model.sizes import find_official
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate import arrange
from gemma_export.quantize.calibrate.budget import Budget, spend_budget
from gemma_export.quantize.calibrate.text import LENGTH, Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.effort import calibration_efforts
from gemma_export.quantize.recipe import RECIPES, bits_per_weight

_SEQUENCES = 4


def _narrow(size: str) -> GemmaConfig:
    """Layers and traits of an official model, in a quarter of its width and with few tokens."""
    config = find_official(size).config
    return replace(
        config,
        kinds=config.kinds[:2],
        hidden_size=256,
        intermediate_size=512,
        heads=4,
        kv_heads=1,
        head_dim=64,
        vocab_size=1024,
    )


def _product(_: object, a: Sequence[int], b: Sequence[int], **rest: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(q: Sequence[int], k: Sequence[int], *rest: object, **more: object) -> int:
    return 2 * 2 * math.prod(q) * k[-2]


_UNKNOWN = {  # to torch 2.13's counter
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


class _Counting:
    """Counts multiply-adds of each stage, in all threads of `in_order` and in this one."""

    def __init__(self) -> None:
        self.modes: list[FlopCounterMode] = []
        self.stages: dict[str, float] = {}

    def pool(self, count: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, initializer=self.enter)

    def enter(self) -> None:
        """Count in this thread from now on."""
        mode = FlopCounterMode(display=False, custom_mapping=_UNKNOWN)
        self.modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Count no more in the thread that entered first."""
        self.modes[0].__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Tick]:
        before = self._total()
        yield lambda name, done: None
        self.stages[title] = self._total() - before

    def _total(self) -> float:
        return sum(mode.get_total_flops() for mode in self.modes) / 2


@pytest.mark.parametrize(("size", "name"), [("2b", "int4-distilled"), ("270m", "int8-smooth")])
def test_counts_are_those_of_torch(
    size: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, recipe = _narrow(size), RECIPES[name]
    tokens = torch.arange(_SEQUENCES * LENGTH).view(_SEQUENCES, LENGTH) % config.vocab_size
    text, checkpoint = Calibration("numbers", tokens), RandomCheckpoint(config, 3)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(arrange, "SWAPS", 1)  # many steps without products
    counting = _Counting()
    pool = counting.pool(1)
    monkeypatch.setattr(parallel, "_pool", lambda count: pool)
    budget = Budget(recipe, bits_per_weight(config, recipe.formats(config)) + 1)
    with ExitStack() as stack:
        stack.enter_context(pool)
        counting.enter()
        stack.callback(counting.leave)
        if recipe.distilled:
            spend_budget(budget, checkpoint, text, counting.stage, splits_table=True)
        CalibratedWeights(Workspace(checkpoint, recipe, text, CPU), counting.stage).round_all()
    efforts = calibration_efforts(config, recipe, _SEQUENCES, spends_bits=recipe.distilled)
    assert list(efforts) == list(counting.stages)
    products = {name: effort.short + effort.exact for name, effort in efforts.items()}
    assert products == pytest.approx(counting.stages, rel=0.1)
