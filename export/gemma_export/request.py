"""An export request: checks and plans it without reading weights or importing torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.open import (
    is_random,
    may_be_opened,
    open_checkpoint,
    planned_config,
)
from gemma_export.choose import Choice, Needs, choose_recipe, exact_choice, fitted
from gemma_export.device import HOST, check_device, kind_of
from gemma_export.model.config import GemmaConfig
from gemma_export.model.sizes import find_official
from gemma_export.plan import CalibrationTime, Plan, StageTime, make_plan
from gemma_export.quantize.recipe import RECIPES, Recipe
from gemma_export.targets import Geometry, Target, cache_dtype, load_targets, refuse_irregular
from gemma_runtime.errors import DeviceError, TargetError

_DEFAULT_CONTEXT, _DEFAULT_PREFILL = 4096, 512


@dataclass(frozen=True, slots=True)
class ExportRequest:
    targets: tuple[str, ...]
    recipe: Recipe | None  # None: chosen for model and targets, see `choose_recipe`
    checkpoint: str | None = None  # None: the official checkpoint of `size`
    size: str | None = None
    family: str | None = None
    base: str | None = None  # the model of an adapter given as `checkpoint`
    adapters: tuple[str, ...] = ()  # FOLDER[=WEIGHT], merged in this order
    revision: str | None = None  # branch, tag or commit on the hub; None: the default branch
    config_file: Path | None = None  # config.json with the shapes of random weights
    context_length: int | None = None
    prefill_length: int | None = None
    full_cache: bool = False
    cache: str | None = None  # type of the KV caches; None: each target's default
    options: Mapping[str, str] = field(default_factory=dict)  # options of single targets, by name
    output: Path | None = None
    max_ram: int | None = None  # bytes
    device: str = "auto"  # what runs the reference and calibration, see `gemma_export.device`
    max_vram: int | None = None  # bytes of the device, if it isn't the host
    force: bool = False
    require_exact: bool = False
    eval_text: Path | None = None  # text whose float32 probabilities every bundle stores
    # Text for calibrated recipes and int8 caches; None: the default text.
    calibration: Path | None = None
    bits: float | None = None  # most bits per weight: int8 is added to the recipe's int4 up to it

    @property
    def model(
        self,
    ) -> tuple[
        str | None, str | None, str | None, Path | None, str | None, tuple[str, ...], str | None
    ]:
        """The arguments of `open_checkpoint`."""
        return (
            self.checkpoint, self.size, self.family, self.config_file, self.base, self.adapters,
            self.revision,
        )  # fmt: skip

    @property
    def has_int8_caches(self) -> bool:
        return self.cache == "int8"

    def calibrates(self, recipe: Recipe) -> bool:
        """Whether the recipe, or `bits` on top of it, needs calibration text."""
        return recipe.is_calibrated or self.bits is not None

    def reads_text(self, recipe: Recipe) -> bool:
        """Whether weights or caches need calibration text."""
        return self.calibrates(recipe) or self.has_int8_caches


def check_request(request: ExportRequest) -> None:
    """Raise a GemmaError for an unknown target, option, cache type, device, size or family."""
    check_device_choice(request.device, request.max_vram)
    load_targets(request.targets, request.options)
    for name in request.targets:
        cache_dtype(name, request.cache)
    if request.size:
        find_official(request.size, request.family)


def check_device_choice(device: str, max_vram: int | None) -> None:
    """Raise DeviceError for an unknown device, or a limit (bytes) of one that is the host."""
    check_device(device)
    if max_vram is not None and kind_of(device) == HOST:
        raise DeviceError(
            f"--max-vram limits the memory of an accelerator, but --device is {device}, which is "
            "the host; name another, or use --max-ram"
        )


def plan_exports(request: ExportRequest) -> list[Plan]:
    """Sizes and memory of each bundle, computed without reading weights.

    Raises TargetError for an encoder: see `plan_model`.
    """
    checkpoint, config = find_planned(request)
    if config.is_encoder:
        raise TargetError(
            f"{request.checkpoint or request.size} gives vectors, expected a model that generates "
            "text"
        )
    return plan_found(request, checkpoint, config)


def find_planned(request: ExportRequest) -> tuple[Checkpoint | None, GemmaConfig]:
    """The model to plan for: its config, and the checkpoint if the plan depends on its weights."""
    checkpoint = _planned_checkpoint(request)
    config = planned_config(*request.model) if checkpoint is None else checkpoint.config
    return checkpoint, config


def plan_found(
    request: ExportRequest, checkpoint: Checkpoint | None, config: GemmaConfig
) -> list[Plan]:
    """The plans for what `find_planned` found, if it generates text."""
    targets = load_targets(request.targets, request.options)
    has_text = _text_check(request, checkpoint or config)
    choice = find_choice(request, targets, checkpoint or config, has_text)
    recipe = choice.recipe if checkpoint is None else kept_recipe(choice.recipe, checkpoint)
    plans = [plan_export(config, request, recipe, target) for target in targets]
    time = None
    if request.reads_text(recipe) and all(plan.counts_calibration for plan in plans):
        time = _calibration_time(config, request, recipe, has_text())
    return [replace(plan, reason=choice.reason, calibration=time) for plan in plans]


def plan_export(
    config: GemmaConfig, request: ExportRequest, recipe: Recipe, target: Target
) -> Plan:
    """The plan of one bundle.

    Raises TargetError for formats, or parts of the model, that the target doesn't support.
    """
    refuse_irregular(target.name, config)
    geometry = export_geometry(request, config)
    caches = target.caches(config, geometry)
    formats = recipe.formats(config)
    target.check(formats, geometry)
    plan = make_plan(
        config, recipe.name, formats, caches, geometry, target.name, request.cache, request.device
    )
    calibrating = _calibration_bytes(config, request, recipe, kind_of(request.device))
    if calibrating is None:
        return replace(plan, counts_calibration=False)
    on_host, working = calibrating
    if plan.device_peak_bytes is not None:
        plan = replace(plan, device_peak_bytes=max(plan.device_peak_bytes, working))
    return replace(plan, export_peak_bytes=max(plan.export_peak_bytes, on_host))


def find_choice(
    request: ExportRequest,
    targets: Sequence[Target],
    model: Checkpoint | GemmaConfig,
    has_text: Callable[[], bool] | None = None,
) -> Choice:
    """The request's own recipe, or else the one that suits the model best.

    A config alone is that of an official model or of random weights: neither is quantized.
    """
    config = model if isinstance(model, GemmaConfig) else model.config
    if request.recipe is not None:
        return Choice(fitted(request.recipe, config, targets))
    if request.require_exact:
        return exact_choice()

    has_text = has_text or _text_check(request, model)
    source = None if isinstance(model, GemmaConfig) else kept_recipe(RECIPES["source"], model)
    geometry = export_geometry(request, config)
    return choose_recipe(Needs(config, targets, geometry, request.bits, has_text, source))


def _text_check(request: ExportRequest, model: Checkpoint | GemmaConfig) -> Callable[[], bool]:
    """Tells whether the model has a tokenizer, and so can read text."""

    @cache  # a GGUF file's tokenizer has to be rebuilt
    def has_text() -> bool:
        if isinstance(model, GemmaConfig):
            return request.checkpoint is None or not is_random(request.checkpoint)
        return model.tokenizer() is not None

    return has_text


def _calibration_time(
    config: GemmaConfig, request: ExportRequest, recipe: Recipe, has_text: bool
) -> CalibrationTime:
    """How long calibration takes, at the rates of this machine now. Needs torch."""
    from gemma_export.computing import choose_device
    from gemma_export.quantize.calibrate.text import LENGTH, expected_sequences
    from gemma_export.quantize.effort import Effort, calibration_efforts, measure_rates

    sequences = expected_sequences(request.calibration, has_text=has_text)
    efforts = calibration_efforts(
        config,
        recipe,
        sequences,
        spends_bits=request.bits is not None,
        int8_caches=request.has_int8_caches,
    )
    try:
        rates = measure_rates(choose_device(request.device))
    except DeviceError:  # the plan is for another machine
        rates = None

    def seconds(effort: Effort) -> float | None:
        return None if rates is None else rates.seconds(effort)

    stages = tuple(
        StageTime(
            name,
            round(effort.short + effort.exact + effort.solved),
            round(effort.moved),
            seconds(effort),
        )
        for name, effort in efforts.items()
    )
    total = seconds(sum(efforts.values(), Effort()))
    return CalibrationTime(sequences * LENGTH, stages, total)


def _calibration_bytes(
    config: GemmaConfig, request: ExportRequest, recipe: Recipe, kind: str
) -> tuple[int, int] | None:
    """The most memory of the host, and of the device, that reading calibration text takes; None if
    torch is missing.
    """
    if not request.reads_text(recipe):
        return 0, 0
    try:
        from gemma_export.quantize import calibrated
    except ModuleNotFoundError:
        return None
    peaks, working = [0], [0]
    if request.calibrates(recipe):
        peaks.append(calibrated.peak_bytes(config, recipe, request.bits, kind))
        working.append(calibrated.working_bytes(config, recipe, request.bits, kind))
    if request.has_int8_caches:
        peaks.append(calibrated.scales_peak_bytes(config, kind))
        working.append(calibrated.scales_working_bytes(config, kind))
    return max(peaks), max(working)


def _planned_checkpoint(request: ExportRequest) -> Checkpoint | None:
    """The checkpoint if the recipe depends on its weights; says so if torch is not installed."""
    source, recipe = request.checkpoint, request.recipe
    if recipe is not None:
        is_needed = source is not None and recipe.keeps_codes
    else:
        is_needed = may_be_opened(source, request.base, request.adapters, request.revision)
    return open_checkpoint(*request.model) if is_needed else None


def kept_recipe(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the formats of the codes that it keeps, if it keeps some."""
    from gemma_export.quantize.kept import resolve_recipe

    return resolve_recipe(recipe, checkpoint).recipe


def bundle_folder(
    request: ExportRequest, recipe: Recipe, checkpoint: Checkpoint, target: str
) -> Path:
    """`--output`, or a folder in it if there are several targets."""
    model = Path(checkpoint.id).name.replace(".gguf", "").replace(":", "-")
    bits = "" if request.bits is None else f"-{request.bits:g}bits"
    name = f"{model}-{recipe.name}{bits}-{target}"
    if request.output is None:
        return Path("out") / name
    return request.output if len(request.targets) == 1 else request.output / name


def find_context(request: ExportRequest, longest: int, usual: int) -> int:
    """The context asked for, or else the usual one of a model that supports so many tokens.

    Raises TargetError if the model does not support it.
    """
    context = request.context_length or min(usual, longest)
    if not 2 <= context <= longest:
        raise TargetError(f"--context is {context}; this model supports 2 to {longest} tokens")
    return context


def export_geometry(request: ExportRequest, config: GemmaConfig) -> Geometry:
    longest = config.max_position
    context = find_context(request, longest, _DEFAULT_CONTEXT)
    prefill = request.prefill_length or min(_DEFAULT_PREFILL, context)
    if not 1 <= prefill <= context:
        raise TargetError(f"--prefill is {prefill}; expected 1 to {context}, the context length")
    return Geometry(context, prefill, request.full_cache)
