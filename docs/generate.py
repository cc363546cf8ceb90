"""Writes the parts of the documentation that are generated from the code.

    python docs/generate.py            # rewrite them
    python docs/generate.py --check    # print the outdated pages; exit with 1 if there are any

A generated part lies between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import exportable
from markdown_table import table
from typer import Typer
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
_PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EVERYWHERE = ("version", "help", "install_completion", "show_completion")
_PACKAGES = (ROOT / "export/gemma_export", ROOT / "runtime/gemma_runtime")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page is outdated"
    )
    check = parser.parse_args().check
    outdated = list(outdated_pages())
    for page, text in outdated:
        print(f"{'outdated' if check else 'wrote'}: {page.relative_to(ROOT)}")
        if not check:
            page.write_text(text, "utf-8")
    if check and outdated:
        sys.exit("error: run python docs/generate.py")


def outdated_pages() -> Iterator[tuple[Path, str]]:
    """Pages whose generated parts don't match the code, each with its new text."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text("utf-8")
        new = _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n{part[3]}", text)
        if new != text:
            yield page, new


def export_flags() -> str:
    from gemma_export.cli import command_line

    return "\n".join(command.markdown() for command in _commands(command_line(), "gemma-export"))


def runtime_commands() -> str:
    from gemma_runtime.cli import app

    return "\n".join(command.markdown() for command in _commands(app, "gemma-runtime"))


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    help: str
    arguments: tuple[tuple[str, str], ...]  # name, meaning
    options: tuple[tuple[str, str, str], ...]  # flag, default, meaning

    def markdown(self) -> str:
        arguments = (name.strip("`") for name, _ in self.arguments)
        usage = " ".join([self.name, *arguments, "[OPTIONS]"])
        lines = [f"## {self.name}", "", *([self.help, ""] if self.help else [])]
        lines += ["```text", usage, "```", ""]
        if self.arguments:
            lines += table(("argument", "meaning"), self.arguments)
        if self.options:
            lines += table(("flag", "default", "meaning"), self.options)
        return "\n".join(lines)


def _commands(app: Typer, name: str) -> Iterator[_Command]:
    return _within(get_command(app), name, "")


def _within(command: object, name: str, help: str) -> Iterator[_Command]:
    """The command, unless it only has subcommands, and all its subcommands."""
    subcommands: Mapping[str, object] = getattr(command, "commands", {})
    own = _command(command, name, help)
    if own.options or not subcommands:
        yield own
    for sub, inner in subcommands.items():
        yield from _within(inner, f"{name} {sub}", _plain(getattr(inner, "help", "") or ""))


def _command(command: object, name: str, help: str) -> _Command:
    arguments, options = [], []
    for parameter in getattr(command, "params"):  # noqa: B009  (typer's classes are private)
        text = _plain(parameter.help or "")
        if parameter.param_type_name == "argument":
            arguments.append((f"`{parameter.metavar or parameter.name.upper()}`", text))
        elif not parameter.hidden and parameter.name not in _EVERYWHERE:
            text, default = _split_default(text, parameter.default, parameter.is_flag)
            options.append((f"`{parameter.opts[0]}`", default, text))
    return _Command(name, help, tuple(arguments), tuple(options))


def _split_default(text: str, default: object, is_flag: bool) -> tuple[str, str]:
    """Split a default in brackets, such as `[model]`, off the end of the help text."""
    if bracketed := re.search(r" ?\[([^\[\]]+)\]$", text):
        return text[: bracketed.start()], bracketed[1]
    shown = "" if is_flag or default is None or default == [] else f"`{default}`"
    return text, shown


def _plain(help: str) -> str:
    """Help text without the terminal's markup."""
    text = re.sub(r"(?<!\\)\[/?bold\]", "", help).replace("\\[", "[")
    return re.sub(r"\s*\n\s*", " ", text).strip()


def recipes() -> str:
    """The table of named recipes: formats, rounding, bits per weight."""
    from gemma_export.model.config import TABLE
    from gemma_export.model.sizes import find_official
    from gemma_export.quantize.recipe import RECIPES, Recipe, bits_per_weight

    layer = "model.layers.0.mlp.down_proj.weight"
    sizes = (find_official("270m").config, find_official("2b").config)

    def bits(recipe: Recipe) -> list[str]:
        if any(rule.rounding == "kept" for rule in recipe.rules):
            return ["the source's"] * len(sizes)
        return [f"{round(bits_per_weight(c, recipe.formats(c)), 3):g}" for c in sizes]

    rows = []
    for recipe in RECIPES.values():
        rule = recipe.rule(layer)
        steps = ("smoothed, " * rule.smooth, rule.rounding, ", then distilled" * recipe.distilled)
        rounding = "".join(steps)
        formats = (str(recipe.rule(name).format) for name in (layer, TABLE))
        rows.append((f"`{recipe.name}`", *formats, rounding, *bits(recipe)))
    head = ("recipe", "layers", "table", "rounding of layers", "bits, 270m", "bits, Gemma 2 2b")
    return "\n".join(table(head, rows))


def house_tree() -> str:
    """The folder tree of both packages, with the first sentence of each docstring."""
    lines = []
    for package in _PACKAGES:
        for folder, described in _folders(package):
            name = f"{'  ' * len(folder.relative_to(package).parts)}{folder.name}/"
            lines.append(f"{name:20}{described}".rstrip())
    return "\n".join(["```text", *lines, "```", ""])


def house_modules() -> str:
    """A table of modules for each folder of both packages."""
    parts = []
    for package in _PACKAGES:
        for folder, described in _folders(package):
            modules = [path for path in sorted(folder.glob("*.py")) if path.stem[0] != "_"]
            rows = [(f"`{path.name}`", first_sentence(path)) for path in modules]
            heading = [f"### {folder.relative_to(package.parent).as_posix()}", "", described, ""]
            parts += [*heading, *(table(("module", "content"), rows) if rows else [])]
    return "\n".join(parts)


def _folders(package: Path) -> Iterator[tuple[Path, str]]:
    for folder in (package, *sorted(path for path in package.rglob("*") if path.is_dir())):
        if any(folder.glob("*.py")):
            init = folder / "__init__.py"
            yield folder, first_sentence(init) if init.exists() else ""


def first_sentence(module: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text("utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z])", paragraph)[0]


def export_api() -> str:
    return _reference("gemma_export", ROOT / "export/gemma_export/__init__.py")


def runtime_api() -> str:
    return _reference("gemma_runtime", ROOT / "runtime/gemma_runtime/__init__.py")


def _reference(package: str, module: Path) -> str:
    """A mkdocstrings entry for each name in the package's `__all__`."""
    names = (name for name in public_names(module) if name != "__version__")
    return "\n".join(f"::: {package}.{name}\n" for name in names)


def public_names(module: Path) -> list[str]:
    """The names in `__all__`, read without importing the package."""
    for statement in ast.parse(module.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    raise SystemExit(f"error: {module} has no __all__; add a list of its public names")


PARTS: Mapping[str, Callable[[], str]] = {
    **exportable.PARTS,
    "export-flags": export_flags,
    "runtime-commands": runtime_commands,
    "recipes": recipes,
    "house-tree": house_tree,
    "house-modules": house_modules,
    "export-api": export_api,
    "runtime-api": runtime_api,
}

if __name__ == "__main__":
    main()
