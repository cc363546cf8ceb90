"""The parts of the page "What can be exported", made from the readers' own tables.

Also tables of other pages that are made from plans.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from markdown_table import table

if TYPE_CHECKING:
    from gemma_export.model.families import Family
    from gemma_export.targets import Target


def sizes() -> str:
    """The official sizes, with the plan of each one's int4 ONNX bundle."""
    from gemma_export import ExportRequest, find_recipe, plan_exports
    from gemma_export.model.sizes import OFFICIAL
    from gemma_runtime.machine import format_bytes

    rows = []
    for official in OFFICIAL:
        config = official.config
        request = ExportRequest(
            targets=("onnx",),
            recipe=find_recipe("int4"),
            size=official.size,
            family=official.family,
            context_length=min(4096, config.max_position),
        )
        (plan,) = plan_exports(request)
        flags = f"`--family {official.family} --size {official.size}`"
        rows.append(
            (
                flags,
                official.hub_id,
                f"{plan.parameters.total / 1e6:,.0f} M",
                str(len(config.layers)),
                next((f"{layer.window:,}" for layer in config.layers if layer.window), "none"),
                f"{official.hf_config['max_position_embeddings']:,}",
                format_bytes(plan.artifact.total),
                format_bytes(plan.run.total),
            )
        )
    head = ("flags", "checkpoint", "weights", "layers", "window", "longest context")
    return "\n".join(table((*head, "`int4` file", "memory to run it"), rows))


def families() -> str:
    from gemma_export.model.families import ENCODERS, FAMILIES

    return _table(
        ("family", "`model_type`", "`architectures`, if there are any", "head of its own"),
        (
            (
                family.title,
                _code((*family.text_types, *family.multimodal)),
                _code(family.classes),
                _head_targets(family) if not family.is_encoder else "none",
            )
            for family in (*FAMILIES.values(), *ENCODERS.values())
        ),
    )


def _head_targets(family: "Family") -> str:
    from gemma_export.model.sizes import OFFICIAL
    from gemma_export.targets import all_targets

    irregular = any(one.config.irregular for one in OFFICIAL if one.family == family.name)
    others = [
        spec.name
        for spec in all_targets()
        if (irregular and not spec.takes_irregular)
        or (spec.name == "gguf" and not family.gguf.reads_head)
    ]
    return "to every target" + (f" but {_code(others)}" if others else "")


def addresses() -> str:
    from gemma_export.checkpoint.open import ADDRESSES

    return _table(("`--checkpoint`", "what it is"), ADDRESSES.items())


def layouts() -> str:
    from gemma_export.checkpoint.weight_files import LAYOUTS

    return _table(("the folder has", "what is read"), LAYOUTS.items())


def names() -> str:
    from gemma_export.checkpoint.packed import FLOATS
    from gemma_export.checkpoint.text_names import NAMES

    rows = [*NAMES.items(), (f"tensors in {_code(FLOATS)}", "read as they are, as float32")]
    return _table(("tensors", "what becomes of them"), rows)


def packed() -> str:
    from gemma_export.checkpoint.packed import GROUPS
    from gemma_export.checkpoint.packed_folder import BESIDE, READERS

    rows = [
        (
            f"{reader.name}, `{method}`",
            " and ".join(map(str, reader.bits)),
            reader.groups,
            reader.kept or "nothing",
            reader.dequantized,
            reader.refused,
        )
        for method, reader in READERS.items()
    ]
    on_grid = (
        "float weights after quantization-aware training",
        "4",
        "32",
        "on the Q4_0 grid",
        "",
        "",
    )
    head = ("format, and its `quant_method`", "bits", "groups", "codes kept by `source`")
    older = " and ".join(f"`{name}` ({method})" for name, method in BESIDE.items())
    return "\n".join(
        [
            *table((*head, "dequantized", "refused"), [*rows, on_grid]),
            GROUPS,
            "",
            f"Files of older tools beside the weights say the same as `config.json`: {older}.",
            "",
        ]
    )


def gguf_types() -> str:
    from gemma_export.checkpoint.sources import gguf_types

    return _table(("GGUF types", "with `--quant source`"), gguf_types())


def adapters() -> str:
    from gemma_export.checkpoint.adapter_folder import MERGED

    return _table(("adapter", "what happens"), MERGED.items())


def tokenizers() -> str:
    from gemma_export.checkpoint.sources import tokenizers

    return _table(("tokenizer", "how it is read"), tokenizers())


def added_tokens() -> str:
    from gemma_export.checkpoint.sources import added_tokens

    return _table(("tokens added to it", "which"), added_tokens())


def templates() -> str:
    from gemma_export.checkpoint.sources import templates

    return _table(("chat template", "how it is read"), templates())


def refused() -> str:
    from gemma_export.checkpoint.sources import refused

    return _table(("refused", "why"), refused())


def targets() -> str:
    """Each target with its weight formats and its types of caches."""
    from gemma_export.targets import all_targets

    return _table(
        ("`--target`", "runs in", "extra", "weight formats", "caches"),
        (
            (
                f"`{t.name}`",
                t.label + ", a beta" * t.is_beta,
                f"`{t.extra}`",
                t.formats,
                _code(t.caches) + (f": {t.only_caches}" if t.only_caches else ""),
            )
            for t in all_targets()
        ),
    )


def target_recipes() -> str:
    """Which recipe goes to which target, and to which layout of it, by the target's own check."""
    from gemma_export.quantize.recipe import RECIPES

    columns = {name: _taken(target) for name, target in _layouts()}
    rows = [
        (
            f"`{recipe.name}`",
            *("yes" if recipe.name in taken else "no" for taken in columns.values()),
        )
        for recipe in RECIPES.values()
        if not recipe.keeps_codes
    ]
    return _table(("recipe", *(f"`{name}`" for name in columns)), rows)


def _layouts() -> Iterator[tuple[str, "Target"]]:
    """Each target, and each with an option's value that takes other recipes."""
    from gemma_export.targets import all_targets, load_target

    for spec in all_targets():
        plain = load_target(spec.name)
        yield spec.name, plain
        for option in spec.options:
            for choice in option.choices:
                other = load_target(spec.name, {option.name: choice})
                if _taken(other) != _taken(plain):
                    yield f"{spec.name} {option.flag} {choice}", other


def auto_recipes() -> str:
    """What `--quant auto` takes for a small and a large model, by target and layout."""
    from gemma_export.choose import Needs, choose_recipe
    from gemma_export.model.sizes import find_official
    from gemma_export.targets import Geometry

    def chosen(size: str, target: "Target") -> str:
        config = find_official(size, None).config
        needs = Needs(config, [target], Geometry(4096, 1), None, lambda: True, None)
        return f"`{choose_recipe(needs).recipe.name}`"

    rows = [(f"`{n}`", chosen("270m", t), chosen("2b", t)) for n, t in _layouts()]
    return _table(("`--target`", "270M", "1b and larger"), rows)


def gemma4_phones() -> str:
    """Which phones an app with Gemma 4's edge sizes fits, by context and caches: what plans say."""
    from gemma_export import ExportRequest, find_recipe, plan_exports
    from gemma_runtime.machine import format_bytes

    rows = []
    settings = [(n, c, t) for n in ("e2b", "e4b") for c in (4096, 32768) for t in (None, "int8")]
    for size, context, cache in settings:
        request = ExportRequest(
            targets=("onnx",),
            recipe=find_recipe("int4"),
            size=size,
            family="gemma4",
            context_length=context,
            cache=cache,
        )
        (plan,) = plan_exports(request)
        memory = (plan.caches.total, plan.run.total)
        verdicts = (phone.verdict for phone in plan.phones)
        name = f"{size.upper()}, {context:,} tokens, {cache or 'float32'} caches"
        rows.append((name, *map(format_bytes, memory), *verdicts))
    phones = (f"{phone.ram_gb} GB" for phone in plan.phones)
    return _table(("`int4`", "caches", "memory", *phones), rows)


def _taken(target: "Target") -> set[str]:
    from gemma_export.model.sizes import OFFICIAL
    from gemma_export.quantize.recipe import RECIPES
    from gemma_export.targets import Geometry
    from gemma_runtime.errors import TargetError

    taken = set(RECIPES)
    everywhere = [official for official in OFFICIAL if not official.config.irregular]
    for recipe in RECIPES.values():
        try:
            for official in everywhere:
                target.check(recipe.formats(official.config), Geometry(4096, 1))
        except TargetError:
            taken.remove(recipe.name)
    return taken


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(table(head, rows))


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


PARTS: Mapping[str, Callable[[], str]] = {
    "sizes": sizes,
    "families": families,
    "addresses": addresses,
    "layouts": layouts,
    "names": names,
    "packed": packed,
    "gguf-types": gguf_types,
    "adapters": adapters,
    "tokenizers": tokenizers,
    "added-tokens": added_tokens,
    "templates": templates,
    "refused": refused,
    "targets": targets,
    "target-recipes": target_recipes,
    "auto-recipes": auto_recipes,
    "edge-phones": gemma4_phones,
}
