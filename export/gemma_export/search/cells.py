"""The cells of a search: every checkpoint with every recipe, target and option."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from gemma_export.digest import digest_of
from gemma_export.memory import parse_bytes
from gemma_export.model.sizes import OFFICIAL, find_official
from gemma_export.quantize.recipe import GROUPS, RECIPES, Recipe, find_recipe, load_recipe
from gemma_export.request import ExportRequest, check_device_choice
from gemma_export.search.schema import Model, RecipeChoice, Scalar, SearchFile, listed
from gemma_export.search.yaml_file import exists, place
from gemma_export.targets import load_target, target_spec
from gemma_runtime.errors import SearchError, nearest_first
from gemma_runtime.manifest import CACHE_WIDTHS

_MOST = 1000  # cells of one search
_AUTO = "auto"
_LAYOUT = ("context", "prefill", "cache", "full_cache")

Settings = Mapping[str, Scalar]  # of the layout and of the target's own options, by name
_Given = str | dict[str, Scalar | tuple[Scalar, ...]]  # a target in the file


@dataclass(frozen=True, slots=True)
class Cell:
    """One bundle to make and to measure."""

    name: str  # of its folder, and the same for the same choices
    model: str  # the checkpoint, as the file names it
    recipe: str  # the recipe's name, or auto
    settings: Settings  # what the file says of layout and options
    request: ExportRequest  # without an output

    @property
    def target(self) -> str:
        return self.request.targets[0]


def find_cells(file: SearchFile, folder: Path, text: Path | None) -> tuple[Cell, ...]:
    """The cells of a search file in `folder`, to which its paths are relative.

    Raises a GemmaError for an unknown recipe, target, option or size. Whether a target can hold a
    recipe is found out later.
    """
    layout = {"context": file.context, "prefill": file.prefill, "cache": file.cache}
    calibration = None if file.calibration is None else place(folder, file.calibration)
    max_ram, max_vram = (_bytes(limit) for limit in (file.max_ram, file.max_vram))
    check_device_choice(file.device, max_vram)
    cells = {}
    choices = (
        (model, own, rounding, target, settings)
        for model, own in _models(file, folder)
        for rounding in _recipes(file, folder)
        for target, settings in _targets(file.targets, layout)
    )
    for count, (model, own, (recipe, bits), target, settings) in enumerate(choices):
        if count == _MOST:
            raise SearchError(f"more than {_MOST} cells; leave out some choices")
        request = replace(
            _laid_out(own, target, settings),
            recipe=recipe,
            bits=bits,
            eval_text=text,
            calibration=calibration,
            max_ram=max_ram,
            device=file.device,
            max_vram=max_vram,
        )
        cell = _cell(model, request, settings)
        cells[cell.name] = cell
    if not cells:
        raise SearchError("no cells: checkpoints, targets and recipes need one choice each")
    return tuple(cells.values())


def _bytes(limit: str | int | None) -> int | None:
    return None if limit is None else parse_bytes(str(limit))


def _cell(model: str, request: ExportRequest, settings: Settings) -> Cell:
    recipe = _AUTO if request.recipe is None else request.recipe.name
    bits = "" if request.bits is None else f"-{request.bits:g}bits"
    rules = None if request.recipe is None else (request.recipe.rules, request.recipe.distilled)
    calibration = None if request.calibration is None else request.calibration.name
    told = (
        model,
        request.targets,
        recipe,
        rules,
        request.bits,
        sorted(settings.items()),
        calibration,
    )
    name = Path(model).name.removesuffix(".gguf")
    parts = (name, recipe + bits, *request.targets, digest_of(told)[:8])
    return Cell("-".join(map(_plain, parts)), model, recipe + bits, settings, request)


def _plain(text: str) -> str:
    """The text as a part of a file name: it can't leave a folder or hide."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:48] or "model"


def _models(file: SearchFile, folder: Path) -> Iterator[tuple[str, ExportRequest]]:
    """Each checkpoint as the file names it, with a request for it."""
    sizes = {official.size for official in OFFICIAL}
    given: tuple[str | Model, ...] = listed(file.checkpoints)
    for one in given:
        if isinstance(one, str):
            one = Model(size=one) if one in sizes else Model(checkpoint=one)
        if one.checkpoint is None and one.size is None:
            raise SearchError("checkpoints: one has neither checkpoint nor size")
        if one.size is not None:
            find_official(one.size, one.family)
        request = ExportRequest(
            targets=(),
            recipe=None,
            checkpoint=_place(one.checkpoint, folder),
            size=one.size,
            family=one.family,
            base=_place(one.base, folder),
            adapters=tuple(_place(adapter, folder) or "" for adapter in one.adapters),
            revision=one.revision,
            config_file=None if one.config is None else place(folder, one.config),
        )
        yield _named(one), request


def _named(model: Model) -> str:
    """A short text that tells this checkpoint from others."""
    parts = (model.checkpoint, model.family, model.size, *model.adapters, model.revision)
    return " ".join(part for part in parts if part)


def _place(text: str | None, folder: Path) -> str | None:
    """A path relative to the file, if there is one; hub ids and names such as demo stay."""
    if text is None:
        return None
    path = place(folder, text)
    return str(path) if exists(path) or text.startswith(("./", "../")) else text


_Rounding = tuple[Recipe | None, float | None]  # recipe (None: auto), and most bits per weight


def _recipes(file: SearchFile, folder: Path) -> list[_Rounding]:
    if file.recipes is None:
        return [(recipe, None) for recipe in RECIPES.values() if not recipe.keeps_codes]
    given: tuple[str | RecipeChoice, ...] = listed(file.recipes)
    return [rounding for one in given for rounding in _roundings(one, folder)]


def _roundings(given: str | RecipeChoice, folder: Path) -> Iterator[_Rounding]:
    if isinstance(given, str):
        is_file = given.endswith((".yaml", ".yml"))
        given = RecipeChoice(file=given) if is_file else RecipeChoice(quant=given)
    if (given.quant is None) == (given.file is None):
        raise SearchError("recipes: give one of quant and file")
    if given.file is not None:
        recipe: Recipe | None = load_recipe(place(folder, given.file))
    else:
        recipe = None if given.quant == _AUTO else find_recipe(given.quant or "")
    for group, bits in product(listed(given.group), listed(given.bits)):
        if bits is not None and not 0 < bits <= 32:
            raise SearchError(f"recipes: bits is {bits:g}; expected up to 32")
        yield recipe if group is None else _grouped(recipe, group), bits


def _grouped(recipe: Recipe | None, group: int) -> Recipe:
    """The recipe with other groups: of its 4-bit matrices, or of those in 8 bits if it has none."""
    if recipe is None:
        raise SearchError("recipes: group needs a recipe; auto chooses its own")
    if group not in GROUPS:
        *some, last = GROUPS
        raise SearchError(
            f"recipes: group is {group}; expected {', '.join(map(str, some))} or {last}"
        )
    bits = min(rule.format.bits for rule in recipe.rules)
    rules = tuple(
        replace(rule, format=replace(rule.format, group=group))
        if rule.format.bits == bits and not rule.format.per_channel and not rule.format.is_float
        else rule
        for rule in recipe.rules
    )
    if rules == recipe.rules:
        return recipe
    return replace(recipe, name=f"{recipe.name}-g{group}", rules=rules)


def _targets(
    given: _Given | tuple[_Given, ...], layout: Mapping[str, Scalar | tuple[Scalar, ...] | None]
) -> Iterator[tuple[str, Settings]]:
    """Each target with each combination of its settings."""
    targets: tuple[_Given, ...] = listed(given)
    for one in targets:
        own = {"target": one} if isinstance(one, str) else dict(one)
        name = str(own.pop("target", ""))
        known = (*_LAYOUT, *(option.name for option in target_spec(name).options))
        for key in own:
            if key not in known:
                choices = nearest_first(key, ("target", *known))
                raise SearchError(f"targets: unknown key {key!r} of {name}; expected {choices}")
        asked = {**layout, **own}
        for values in product(*map(listed, asked.values())):
            pairs = zip(asked, values, strict=True)
            yield name, {key: value for key, value in pairs if value is not None}


def _laid_out(request: ExportRequest, target: str, settings: Settings) -> ExportRequest:
    """The request for a target with settings. Raises a GemmaError for values of a wrong kind."""
    options = {key: str(value) for key, value in settings.items() if key not in _LAYOUT}
    load_target(target, options)
    full_cache = settings.get("full_cache", False)
    if not isinstance(full_cache, bool):
        raise SearchError(f"full_cache is {full_cache!r}; expected true or false")
    cache = settings.get("cache")
    if cache is not None and cache not in CACHE_WIDTHS:
        choices = nearest_first(str(cache), CACHE_WIDTHS)
        raise SearchError(f"cache is {cache!r}; choose from {choices}")
    return replace(
        request,
        targets=(target,),
        context_length=_tokens(settings, "context"),
        prefill_length=_tokens(settings, "prefill"),
        full_cache=full_cache,
        cache=None if cache is None else str(cache),
        options=options,
    )


def _tokens(settings: Settings, name: str) -> int | None:
    value = settings.get(name)
    if value is None or (type(value) is int and 0 < value < 1 << 31):
        return value
    raise SearchError(f"{name} is {value!r}; expected a number of tokens")
