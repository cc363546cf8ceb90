"""Recipes choose the format and rounding of every weight matrix."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import msgspec

from gemma_export.formats.format import FLOAT, INT4, INT4_ASYM, INT8, INT8_WIDE, Format
from gemma_export.model.config import (
    DENSE_MATRICES,
    HEAD,
    PER_LAYER_MATRICES,
    PER_LAYER_PROJECTION,
    PER_LAYER_TABLE,
    TABLE,
    GemmaConfig,
)
from gemma_runtime.errors import MissingExtra, RecipeError, nearest_first

GROUPS = (16, 32, 64, 128, 256)  # weights that may share a scale
_INT8_STEP = 128  # int8 columns come in multiples of this
# gptq and weighted need calibration text; kept copies the source's own codes.
Rounding = Literal["nearest", "searched", "weighted", "gptq", "kept"]


@dataclass(frozen=True, slots=True)
class Rule:
    pattern: str  # a shell pattern over tensor names
    format: Format
    rounding: Rounding = "searched"
    smooth: bool = False  # columns are multiplied by factors, see `calibrate.smoothed`

    @property
    def observes_inputs(self) -> bool:
        """Whether it needs to know what the float model feeds to a matrix."""
        return self.smooth or self.rounding == "weighted"


_INT8_CHANNEL = Format(8, per_channel=True)
_PER_LAYER = Rule(PER_LAYER_MATRICES, INT8, "nearest")
_SENSITIVE = (PER_LAYER_MATRICES, DENSE_MATRICES)  # small, and all of the model passes through them


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules for matrices; the first rule that matches a name applies. Norms stay float32.

    A head apart from the table has the table's rule, unless a rule names it. Likewise the matrices
    that gate and project per-layer embeddings are int8 where all others are int4: they are 1 % of
    the weights and half of the error (exllamav3, issue 253). So are an encoder's dense layers. The
    table of per-layer embeddings is only looked up, so there are no products whose error gptq could
    lower: its scales are searched instead.
    """

    name: str
    rules: tuple[Rule, ...]
    distilled: bool = False  # scales, codes and norms learned from the float32 model's logits

    @property
    def is_calibrated(self) -> bool:
        """Whether it reads calibration text."""
        return self.rounds_by_text or self.is_smooth

    @property
    def keeps_codes(self) -> bool:
        """Whether it keeps codes of a quantized checkpoint."""
        return any(rule.rounding == "kept" for rule in self.rules)

    @property
    def is_smooth(self) -> bool:
        """Whether it smooths anything."""
        return any(rule.smooth for rule in self.rules)

    @property
    def observes_inputs(self) -> bool:
        """Whether it needs to know what the float model feeds to any matrix."""
        return any(rule.observes_inputs for rule in self.rules)

    @property
    def rounds_by_text(self) -> bool:
        """Whether codes are chosen by what the model computes, and not by the weights alone."""
        return self.distilled or any(r.rounding in ("gptq", "weighted") for r in self.rules)

    def scales_table(self, config: GemmaConfig) -> bool:
        """Whether columns of the table are multiplied by factors, so looked-up rows are divided."""
        rule = self.rule(TABLE)
        divided = rule.format.int8_columns > 0 and rule.rounding == "gptq"
        return divided or self.smooths_table(config)

    def smooths_table(self, config: GemmaConfig) -> bool:
        """Whether the table has factors because it is the head; others are not smoothed."""
        return config.tied and self.smooths(TABLE)

    def smooths(self, tensor: str) -> bool:
        """Whether a matrix is to be smoothed; one in float has no need of it."""
        rule = self.rule(tensor)
        return rule.smooth and not rule.format.is_float

    def rule(self, tensor: str) -> Rule:
        if tensor == HEAD and not any(_names_head(rule) for rule in self.rules):
            return self.rule(TABLE)
        rule = next(rule for rule in self.rules if fnmatchcase(tensor, rule.pattern))
        is_general = rule.pattern == "*" and rule.format.bits == 4
        if is_general and any(fnmatchcase(tensor, one) for one in _SENSITIVE):
            return _PER_LAYER
        if tensor == PER_LAYER_TABLE and rule.rounding == "gptq":
            return replace(rule, rounding="searched")
        return rule

    def with_plain_table(self) -> "Recipe":
        """The recipe with a table without factors, for targets that can't undo them."""
        plain = Rule(TABLE, self.rule(TABLE).format, "weighted")
        return replace(self, rules=_merged([plain], self.rules))

    def with_per_layer_channels(self) -> "Recipe":
        """The recipe with one scale per channel where per-layer embeddings get int8 unasked."""
        rules = list(self.rules)
        at = next((i for i, rule in enumerate(rules) if rule.pattern == "*"), len(rules))
        if self.rule(PER_LAYER_PROJECTION) is _PER_LAYER:
            rules.insert(at, replace(_PER_LAYER, format=_INT8_CHANNEL))
        return replace(self, rules=tuple(rules))

    def formats(self, config: GemmaConfig) -> dict[str, Format]:
        """Format of every weight matrix. Raises RecipeError for rules that don't fit the model."""
        matrices = {n: s for n, s in config.tensor_shapes().items() if len(s) == 2}
        self._check_patterns(matrices)
        self._check_smooth(config.tables)
        self._check_weighted(matrices, config.tables)
        formats = {name: self._format(name, shape[1]) for name, shape in matrices.items()}
        for name, fmt in formats.items():
            width = matrices[name][1]
            if fmt.int8_columns and (
                name != TABLE or fmt.bits != 4 or fmt.int8_columns not in int8_choices(width)
            ):
                raise RecipeError(
                    f"recipe {self.name}: int8_columns is {fmt.int8_columns} for {name}, which "
                    f"has {width} columns; expected a multiple of {_INT8_STEP} below that, and "
                    f"only for {TABLE} in 4 bits"
                )
            if fmt.int8_columns and not config.tied:
                raise RecipeError(
                    f"recipe {self.name}: int8_columns needs a head that is the table, but this "
                    f"model has a separate {HEAD}; leave int8_columns out"
                )
            for columns, own in fmt.pieces(name, width).values():
                inputs = len(range(width)[columns])
                if not own.is_float and inputs % own.group:
                    raise RecipeError(
                        f"recipe {self.name}: group {own.group} does not divide the "
                        f"{inputs} inputs of {name}; choose another group or bits: 32"
                    )
        return formats

    def _format(self, name: str, width: int) -> Format:
        fmt = self.rule(name).format
        return replace(fmt, group=width) if fmt.per_channel else fmt

    def _check_patterns(self, names: Mapping[str, object]) -> None:
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in names):
                raise RecipeError(
                    f"recipe {self.name}: pattern {rule.pattern!r} matches no weight matrix; "
                    f"names are like {', '.join(list(names)[:2])}"
                )

    def _check_smooth(self, tables: Iterable[str]) -> None:
        for rule in self.rules:
            if rule.smooth and rule.rounding == "kept":
                raise RecipeError(
                    f"recipe {self.name}: {rule.pattern!r} is smooth, but codes that are kept "
                    "can't be changed; choose another rounding, or leave smooth out"
                )
        for name in tables:
            rule = self.rule(name)
            if rule.smooth and (rule.format.bits == 4 or rule.format.int8_columns):
                raise RecipeError(
                    f"recipe {self.name}: {name} is smooth in {rule.format}; expected 8 bits in "
                    "one piece, or smooth: false"
                )

    def _check_weighted(self, names: Iterable[str], tables: Iterable[str]) -> None:
        for name in names:
            rule = self.rule(name)
            if rule.rounding != "weighted" or (name in tables and rule.format.bits == 8):
                continue
            raise RecipeError(
                f"recipe {self.name}: {name} in {rule.format} has the rounding weighted; expected "
                f"that only for {TABLE} and {HEAD}, in 8 bits"
            )


def _names_head(rule: Rule) -> bool:
    """Whether the rule is for the head, and not for every matrix."""
    return fnmatchcase(HEAD, rule.pattern) and not fnmatchcase(TABLE, rule.pattern)


def bits_per_weight(config: GemmaConfig, formats: Mapping[str, Format]) -> float:
    """Average over all matrix weights, including scales and zero points."""
    shapes = config.tensor_shapes()
    bits = sum(matrix_bits(shapes[name], fmt) for name, fmt in formats.items())
    return bits / sum(shapes[name][0] * shapes[name][1] for name in formats)


def tensor_formats(config: GemmaConfig, formats: Mapping[str, Format]) -> dict[str, str]:
    """Format of every matrix by name, or of each of its pieces if it is stored in several."""
    widths = {name: config.tensor_shapes()[name][1] for name in formats}
    return {
        piece: str(own)
        for name, fmt in formats.items()
        for piece, (_, own) in fmt.pieces(name, widths[name]).items()
    }


def int8_choices(width: int) -> range:
    """Allowed numbers of int8 columns in a table of this width, other than none and all."""
    return range(_INT8_STEP, width, _INT8_STEP)


def matrix_bits(shape: tuple[int, ...], fmt: Format) -> float:
    """Bits of a matrix (N, K), including scales and zero points."""
    rows, width = shape
    pieces = fmt.pieces("", width).values()
    return sum(rows * len(range(width)[columns]) * f.bits_per_weight for columns, f in pieces)


def _grouped(group: int) -> tuple[Recipe, ...]:
    """Int4 in groups longer than 32: faster and smaller, and calibration has more to make up."""
    name, fmt = f"int4-g{group}", Format(4, group)
    return (
        Recipe(name, (Rule("*", fmt),)),
        Recipe(f"{name}-gptq", (Rule("*", fmt, "gptq"),)),
        Recipe(f"{name}-distilled", (Rule("*", fmt, "gptq"),), distilled=True),
    )


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int4", (Rule("*", INT4),)),
        *_grouped(64),
        *_grouped(128),
        Recipe("int4-asym", (Rule("*", INT4_ASYM),)),
        Recipe("mixed", (Rule(TABLE, INT8_WIDE, "nearest"), Rule("*", INT4_ASYM))),
        Recipe("int8", (Rule("*", INT8, "nearest"),)),
        Recipe(
            "int8-smooth",
            (
                Rule(TABLE, INT8, "weighted", smooth=True),
                Rule("*", INT8, "nearest", smooth=True),
            ),
        ),
        Recipe("int8-weighted", (Rule(TABLE, INT8, "weighted"), Rule("*", INT8, "nearest"))),
        Recipe("int8-channel", (Rule("*", _INT8_CHANNEL, "nearest"),)),
        Recipe(
            "int8-channel-smooth",
            (
                Rule(TABLE, _INT8_CHANNEL, "weighted", smooth=True),
                Rule("*", _INT8_CHANNEL, "nearest", smooth=True),
            ),
        ),
        Recipe(
            "int8-channel-weighted",
            (Rule(TABLE, _INT8_CHANNEL, "weighted"), Rule("*", _INT8_CHANNEL, "nearest")),
        ),
        Recipe("source", (Rule("*", INT8, "kept"),)),
        Recipe("int4-gptq", (Rule("*", INT4, "gptq"),)),
        Recipe("int4-distilled", (Rule("*", INT4, "gptq"),), distilled=True),
        Recipe("int4-asym-gptq", (Rule("*", INT4_ASYM, "gptq"),)),
        Recipe("int4-asym-distilled", (Rule("*", INT4_ASYM, "gptq"),), distilled=True),
        Recipe("mixed-gptq", (Rule(TABLE, INT8_WIDE, "nearest"), Rule("*", INT4_ASYM, "gptq"))),
        Recipe(
            "mixed-distilled",
            (Rule(TABLE, INT8_WIDE, "nearest"), Rule("*", INT4_ASYM, "gptq")),
            distilled=True,
        ),
        Recipe("int4-table8", (Rule(TABLE, INT8, "nearest"), Rule("*", INT4))),
        Recipe("int4-table8-gptq", (Rule(TABLE, INT8, "nearest"), Rule("*", INT4, "gptq"))),
        Recipe(
            "int4-table8-distilled",
            (Rule(TABLE, INT8, "nearest"), Rule("*", INT4, "gptq")),
            distilled=True,
        ),
        Recipe("int4-table8-channel", (Rule(TABLE, _INT8_CHANNEL, "nearest"), Rule("*", INT4))),
        Recipe(
            "int4-table8-channel-gptq",
            (Rule(TABLE, _INT8_CHANNEL, "nearest"), Rule("*", INT4, "gptq")),
        ),
        Recipe("none", (Rule("*", FLOAT, "nearest"),)),
    )
}


def find_recipe(name: str) -> Recipe:
    """A named recipe; raises RecipeError with the choices, nearest first."""
    if name in RECIPES:
        return RECIPES[name]
    raise RecipeError(f"unknown recipe {name!r}; choose from {nearest_first(name, RECIPES)}")


class _Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one pattern in a recipe file; missing ones come from the base recipe."""

    bits: Literal[4, 8, 32] | None = None
    group: int | Literal["channel"] | None = None
    asymmetric: bool | None = None
    int8_columns: int | None = None
    rounding: Rounding | None = None
    smooth: bool | None = None


class _RecipeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base: str = "int4"
    name: str | None = None
    tensors: dict[str, _Choice] = {}
    distilled: bool | None = None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file: `base`, optional `name` and `distilled`, `tensors`: pattern → settings.

    Raises RecipeError with the location of the error.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("pyyaml", "export") from error
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
        file = msgspec.convert(content, type=_RecipeFile)
    except OSError as error:
        raise RecipeError(f"can't read recipe {path}: {error.strerror}") from error
    # ValueError: a date or a number that Python has not, or text that is not UTF-8.
    except (yaml.YAMLError, ValueError, RecursionError, msgspec.ValidationError) as error:
        reason = _unknown_key(str(error)) or " ".join(str(error).split())
        raise RecipeError(f"recipe {path}: {reason}") from error
    base = find_recipe(file.base)
    rules = [_rule(base, pattern, choice, path) for pattern, choice in file.tensors.items()]
    distilled = base.distilled if file.distilled is None else file.distilled
    return Recipe(file.name or path.stem, _merged(rules, base.rules), distilled)


def _unknown_key(message: str) -> str | None:
    """The error text if msgspec's message is about an unknown key; lists the known keys."""
    match = re.fullmatch(r"Object contains unknown field `(.*?)`( - at .*)?", message, re.S)
    if match is None:
        return None
    known = (_Choice if match[2] else _RecipeFile).__struct_fields__
    return f"unknown key {match[1]!r}; expected {nearest_first(match[1], known)}"


def _merged(rules: list[Rule], base: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules, followed by the base rules with other patterns."""
    patterns = {rule.pattern for rule in rules}
    return (*rules, *(rule for rule in base if rule.pattern not in patterns))


def write_recipe(recipe: Recipe) -> str:
    """The YAML text that `load_recipe` reads back as this recipe."""
    import yaml

    tensors = {rule.pattern: _written(rule) for rule in recipe.rules}
    content: dict[str, object] = {"base": "int4", "name": recipe.name, "tensors": tensors}
    if recipe.distilled:
        content["distilled"] = True
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def _written(rule: Rule) -> dict[str, object]:
    fmt = rule.format
    return {
        "bits": fmt.bits,
        "group": "channel" if fmt.per_channel else fmt.group,
        "asymmetric": fmt.asymmetric,
        **({"int8_columns": fmt.int8_columns} if fmt.int8_columns else {}),
        "rounding": rule.rounding,
        **({"smooth": True} if rule.smooth else {}),
    }


def _rule(base: Recipe, pattern: str, choice: _Choice, path: Path) -> Rule:
    default = next((r for r in base.rules if r.pattern in (pattern, "*")), base.rules[-1])
    bits = choice.bits or default.format.bits
    per_channel = choice.group == "channel"
    if choice.group is None and bits == default.format.bits:
        per_channel = default.format.per_channel
    group = 32 if choice.group == "channel" else choice.group or default.format.group
    asymmetric = choice.asymmetric
    if asymmetric is None:
        asymmetric = default.format.asymmetric and bits == default.format.bits
    if group not in GROUPS:
        raise RecipeError(
            f"recipe {path}: group of {pattern!r} is {group}, expected 16, 32, 64, 128, 256 or "
            "channel"
        )
    int8_columns = choice.int8_columns
    if int8_columns is None and bits == default.format.bits:
        int8_columns = default.format.int8_columns
    fmt = Format(bits, group, asymmetric, per_channel, int8_columns or 0)
    smooth = default.smooth if choice.smooth is None else choice.smooth
    return Rule(pattern, fmt, choice.rounding or default.rounding, smooth)
