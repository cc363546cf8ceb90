"""Renders chat templates: Jinja with Hugging Face's conventions, in a sandbox.

A template comes from whoever made the checkpoint. It reaches no file, no module and no attribute
of Python's own, and its work is counted, so that it ends. Not counted is what one filter does to
one value (`replace`, `center`): memory bounds that, and running out of it is an error like others.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_runtime.errors import TokenizerError

# Far above what a template needs: Gemma 3's takes two steps a turn.
_SOURCE_LENGTH = 200_000  # characters
_STEPS = 100_000  # rounds of loops, numbers of ranges, calls
_LENGTH = 1_000_000  # characters or items of a text or list, rendered or in between
_BITS = 64  # of a whole number

# What an expression in a template can raise. Jinja wraps none of them.
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class TemplateRefusal(TokenizerError):
    """The template knows no such conversation."""


def render_template(source: str, names: Mapping[str, object]) -> str:
    """The template's text; raises TokenizerError where it fails, TemplateRefusal where it says no.

    It may use what transformers offers to a template, but `slice`, `batch` and `lipsum`.
    """
    try:
        if len(source) > _SOURCE_LENGTH:
            raise SecurityError(f"it has {len(source)} characters, more than {_SOURCE_LENGTH}")
        pieces = []
        length = 0
        for piece in _Sandbox().from_string(source).generate(names):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
        return "".join(pieces)
    except _FAULTS as error:
        raise TokenizerError(
            f"the chat template fails: {type(error).__name__}: {_one_line(error)}; "
            "fix it in the checkpoint and export again"
        ) from error


class _Counted(CodeGenerator):
    """Compiles a template so that the sandbox hears of each round and each joined text."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.ExprStmt(_call("count", []), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("count", []), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_call("join_text", node.nodes), frame)


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """For one rendering. The conventions are those of transformers' chat_template_utils."""

    code_generator_class = _Counted
    intercepted_binops = frozenset(["*", "**", "+"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self._steps = 0
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["range"] = self._range
        # These loop as often as a number tells them, uncounted.
        for filter_name in ("slice", "batch"):
            del self.filters[filter_name]
        del self.globals["lipsum"]

    def count(self, steps: int = 1) -> bool:
        """True, until there were too many steps."""
        self._steps += steps
        if self._steps > _STEPS:
            raise SecurityError(f"it takes more than {_STEPS} steps")
        return True

    def join_text(self, *parts: object) -> str:
        """The operator `~`."""
        text = "".join(map(str, parts))
        _check_length(len(text))
        return text

    def call(
        self,
        context: Context,
        function: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,  # Jinja's signature
    ) -> Any:
        self.count()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.count(min(len(numbers), _STEPS + 1))
        return numbers


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _check_size(operator: str, left: object, right: object) -> None:
    """Refuse a product, power or sum that is huge, before it is made."""
    if operator == "+":
        _check_length(_length(left) + _length(right))
    elif isinstance(left, int) and isinstance(right, int):
        grown = right * left.bit_length() if operator == "**" else left.bit_length()
        if max(grown, right.bit_length()) > _BITS:
            raise SecurityError(f"{operator} makes a number of more than {_BITS} bits")
    elif operator == "*":
        _check_length(_length(left) * right if isinstance(right, int) else 0)
        _check_length(_length(right) * left if isinstance(left, int) else 0)


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_length(length: int) -> None:
    if length > _LENGTH:
        raise SecurityError(f"it makes a text or list longer than {_LENGTH}")


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(f"the chat template refuses the conversation: {_one_line(message)}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]
