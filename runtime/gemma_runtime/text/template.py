"""Renders chat templates: Jinja with Hugging Face's conventions, in a sandbox.

A template is untrusted: it comes with the checkpoint. It can't reach files, modules or Python's
internal attributes. Its steps, its time, and the length of all it makes are limited, so it always
ends, and in bounded memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.template_budget import (
    LENGTH,
    Budget,
    check_call,
    check_indent,
    check_length,
    check_operator,
    measure,
)

# Far more than a template needs; Gemma 3's takes two steps per turn. `template_budget` has others.
_SOURCE_LENGTH = 200_000  # characters
_LONGEST_DATE = 200
_WEIGHT = 500  # parts of a loop's body that count as one more step
# Their work grows beyond what their arguments show, and no chat needs them.
_LEFT_OUT = ("slice", "batch", "urlize", "wordwrap", "xmlattr", "pprint")

# What an expression in a template can raise. Jinja doesn't wrap these.
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,  # of `1e999`, which Jinja writes as inf
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class TemplateRefusal(TokenizerError):
    """The template rejects the conversation."""


def render_template(source: str, names: Mapping[str, object]) -> str:
    """Render a template.

    Raises TokenizerError if it fails, TemplateRefusal if it calls `raise_exception`. It can use
    everything that transformers offers to a template, except the filters `slice`, `batch`,
    `urlize`, `wordwrap`, `xmlattr` and `pprint`, the function `lipsum`, and widths of formats that
    are arguments.
    """
    try:
        if len(source) > _SOURCE_LENGTH:
            raise SecurityError(f"it has {len(source)} characters, more than {_SOURCE_LENGTH}")
        pieces = []
        length = 0
        for piece in _Sandbox().from_string(source).generate(names):
            pieces.append(piece)
            length += len(piece)
            check_length(length)
        return "".join(pieces)
    except _FAULTS as error:
        raise TokenizerError(
            f"the chat template fails: {type(error).__name__}: {_one_line(error)}; "
            "fix it in the checkpoint and export again"
        ) from error


class _Counted(CodeGenerator):
    """Compiles a template so that the sandbox counts what it does.

    A loop's iteration and a macro's call count for more, the more is in them.
    """

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, _counting(node))
        if node.test is not None:
            node.test = nodes.And(_call("count", []), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:
        node.body.insert(0, _counting(node))
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_call("join_text", node.nodes), frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._within("(environment.tick() and ", super().visit_Compare, node, frame)

    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:
        self._within("(environment.tick() and ", super().visit_Test, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self._within("environment.made(", visit, node, frame)

    def _within(
        self, opening: str, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame
    ) -> None:
        self.write(opening)
        visit(node, frame)
        self.write(")")


class _Namespace(Namespace):
    """Namespaces whose text doesn't show what they hold, which may be themselves."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}` marks the model's turns for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, set up like transformers' chat_template_utils."""

    code_generator_class = _Counted
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self.made_text,
        )
        budget = Budget()
        self.count, self.tick, self.made = budget.count, budget.tick, budget.made
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._counted(name, one)
            for name, one in self.filters.items()
            if name not in _LEFT_OUT
        }
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["range"] = self._range
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def made_text(self, value: Any) -> Any:
        """What `{{ }}` writes."""
        self.tick()
        return self.made(value)

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a macro's call, or of a block that is captured."""
        texts = list(parts)
        check_length(sum(map(len, texts)))
        return str(self.made("".join(texts)))

    def join_text(self, *parts: object) -> str:
        """The operator `~`."""
        check_length(sum(measure(part) for part in parts))
        return str(self.made("".join(map(str, parts))))

    def call(
        self,
        context: Context,
        function: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,  # Jinja's signature
    ) -> Any:
        self.count()
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        subject = getattr(method, "__self__", None)
        if isinstance(subject, str | bytes | int):
            if method.__name__ == "join":
                args = tuple(map(_listed, args))
            check_call(method.__name__, subject, args, kwargs)
        return self.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose calls are counted, and checked as those of methods are."""
        before = int(hasattr(function, "jinja_pass_arg"))  # Jinja's own arguments

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.count()
            given = list(args)
            if name == "join" and len(given) > before:
                given[before] = _listed(given[before])
            check_call(name, next(iter(given[before:]), None), given[before + 1 :], kwargs)
            return self.made(function(*given, **kwargs))

        return run

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.count(min(len(numbers), LENGTH))
        return numbers


def _listed(parts: Any) -> Any:
    """A generator's items as a list, whose length is known."""
    return list(parts) if isinstance(parts, Iterator) else parts


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _counting(node: nodes.Node) -> nodes.ExprStmt:
    weight = 1 + sum(1 for _ in node.find_all(nodes.Node)) // _WEIGHT
    return nodes.ExprStmt(_call("count", [nodes.Const(weight)]), lineno=node.lineno)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML; transformers' doesn't.
    check_indent(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(f"the chat template refuses the conversation: {_one_line(message)}")


def _strftime_now(date_format: str) -> str:
    if len(date_format) > _LONGEST_DATE:
        raise SecurityError(f"it formats a date with more than {_LONGEST_DATE} characters")
    return datetime.now().strftime(date_format)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]
