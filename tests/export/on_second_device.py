"""What tests run in a process that has the second device, and on its host to compare with.

Functions here take and return plain values, because the tests call them in another process.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from gemma_export import computing, pipeline
from gemma_export.checkpoint.folder import open_folder
from gemma_export.computing import CPU, DeviceCeiling
from gemma_export.device import Grain
from gemma_export.model.int8_cache import scales_digest
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import unheard
from gemma_export.quantize import calibrated
from gemma_export.quantize.calibrate import fisher, flow, gptq, layer_weights, layers
from gemma_export.quantize.calibrate.budget import Budget, spend_budget
from gemma_export.quantize.calibrate.cache_scales import measure_caches, measured_scales
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.distill import student
from gemma_export.quantize.recipe import find_recipe, write_recipe
from gemma_export.sidecars.reference import record_reference
from gemma_export.sidecars.teacher import record_teacher
from gemma_export.summary import Summary, summarize
from gemma_runtime.errors import GemmaError
from tests.export.conftest import calibrated_store, stages
from tests.export.second_device import MEMORY, SECOND

_DEVICES = (CPU, SECOND)


@contextmanager
def _float32_products() -> Iterator[None]:
    """The second device multiplies in float32, so the host must too to give the same codes."""
    with _patched((layer_weights, fisher, student), "product_dtype", lambda device: torch.float32):
        yield


@contextmanager
def _patched(
    modules: tuple[ModuleType, ...], name: str, value: Callable[..., object]
) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def _work(
    folder: Path, recipe: str, device: torch.device, count: int = 4, length: int = 24
) -> Workspace:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 96, (count, length), generator=draw)
    return Workspace(open_folder(folder), find_recipe(recipe), Calibration("test", tokens), device)


def calibrate(folder: Path, recipe: str) -> tuple[list[str], int]:
    """Digests of the codes from host and device, and how many tensors moved between them."""
    MEMORY.reset()
    with _float32_products():
        works = [_work(folder, recipe, device) for device in _DEVICES]
        assert works[0].folder != works[1].folder
        return [calibrated_store(work).codes_digest for work in works], MEMORY.moved


def calibrate_without_float64(folder: Path, recipe: str) -> tuple[list[str], bool]:
    """The same for a device that has no float64, and whether it got any."""
    with mock.patch.object(computing, "_WITHOUT_FLOAT64", (SECOND.type,)):
        digests, _ = calibrate(folder, recipe)
    return digests, torch.float64 in MEMORY.dtypes


def spend_bits(folder: Path, recipe: str, bits: float) -> list[str]:
    """The recipes of a budget that was measured on host and device."""
    chosen: list[str] = []
    with _float32_products():
        for device in _DEVICES:
            work = _work(folder, recipe, device)
            budget = Budget(work.recipe, bits)
            args = budget, work.checkpoint, work.calibration, stages(unheard)
            chosen.append(write_recipe(spend_budget(*args, splits_table=True, device=device)))
    return chosen


def measure(folder: Path, recipe: str) -> list[str]:
    """Digests of the scales of int8 caches."""
    with _float32_products():
        works = [_work(folder, recipe, device) for device in _DEVICES]
        store = calibrated_store(works[0])
        for work in works:
            measure_caches(work, store, 64, unheard)
        return [scales_digest(measured_scales(work, 64)) for work in works]


def refer(folder: Path, recipe: str) -> tuple[list[float], list[float]]:
    """KL of the reference's goldens, and the teacher's mean log-probability of the next token."""
    work = _work(folder, recipe, CPU)
    store = calibrated_store(work)
    prompt = work.calibration.tokens[0].tolist()
    texts = {"long": prompt, "short": prompt[:9]}
    distances, means = [], []
    for device in _DEVICES:
        args = work.checkpoint, store, texts, None, unheard, device
        distances.append(record_reference(*args).quality.mean_kl)
        segments = record_teacher(work.checkpoint, texts, unheard, device)
        means.append(sum(float(one.next_log_probs.mean()) for one in segments))
    return distances, means


def held(folder: Path, recipe: str) -> tuple[int, int]:
    """The most bytes that calibration in small pieces held of the device, and the estimate."""
    pieces = Grain(workers=1, batch=1 << 14, weights=1 << 14, table_rows=32)
    modules = flow, gptq, layers, fisher, calibrated
    work = _work(folder, recipe, SECOND, count=4, length=256)
    with _patched(modules, "grain", lambda kind: pieces):
        MEMORY.reset()
        calibrated_store(work)
        config = work.checkpoint.config
        return MEMORY.peak, calibrated.working_bytes(config, work.recipe, None, SECOND.type)


def export(folder: Path, output: Path) -> Summary:
    """An export whose reference and calibration run on the device."""
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe("int4"),
        checkpoint=str(folder),
        context_length=32,
        device="cuda",
        output=output,
    )
    with mock.patch.object(pipeline, "choose_device", return_value=SECOND):
        (result,) = export_bundles(request)
    return summarize(result)


def refusals(estimate: int) -> list[str]:
    """What a ceiling says of an estimate: over a limit, over what is free, and within both."""
    lines: list[str] = []
    for limit, free in ((estimate - 1, 1 << 40), (None, estimate - 1), (estimate, estimate)):
        check = DeviceCeiling(SECOND, limit).check_estimate
        with mock.patch.object(MEMORY, "free", free):
            lines.append(_refusal(partial(check, estimate)))
    return lines


def overflow() -> list[str]:
    """What is said of a peak over the limit, and when the device is out of memory."""
    MEMORY.reset()
    kept = torch.zeros(1000, device=SECOND)

    def exhaust() -> None:
        with computing.computing(SECOND):
            raise torch.OutOfMemoryError("out of memory")

    lines = [_refusal(DeviceCeiling(SECOND, 3999).check_peak), _refusal(exhaust)]
    lines.append(_refusal(DeviceCeiling(SECOND, MEMORY.peak).check_peak))
    assert len(kept) == 1000
    return lines


def _refusal(work: Callable[[], None]) -> str:
    """The message of the error that it raises, or nothing."""
    try:
        work()
    except GemmaError as error:
        return f"{type(error).__name__}: {error}"
    return ""
