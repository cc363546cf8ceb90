"""Renders chat templates: Jinja with Hugging Face's conventions, in a sandbox.

A template is untrusted: it comes with the checkpoint. It can't reach files, modules or Python's
internal attributes. Its steps are counted and limited, so it always ends. The work of a single
filter call (`replace`, `center`) is not counted; running out of memory there gives an error too.
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

# Far more than a template needs: Gemma 3's takes two steps per turn.
_SOURCE_LENGTH = 200_000  # characters
_STEPS = 100_000  # loop iterations, range items, calls
_LENGTH = 1_000_000  # characters of a string or items of a list, final or intermediate
_BITS = 64  # of an integer

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
    everything that transformers offers to a template, except `slice`, `batch` and `lipsum`.
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
    """Compiles a template so that the sandbox counts loop iterations and checks `~`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.ExprStmt(_call("count", []), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("count", []), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_call("join_text", node.nodes), frame)


class _Generation(Extension):
    """`{% generation %}` marks the model's turns for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, set up like transformers' chat_template_utils."""

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
        # Each loops as often as its argument says, without counting.
        for filter_name in ("slice", "batch"):
            del self.filters[filter_name]
        del self.globals["lipsum"]

    def count(self, steps: int = 1) -> bool:
        """Count steps. Returns True, or raises SecurityError above the limit."""
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
    """Raise SecurityError for a huge product, power or sum, before computing it."""
    if operator == "+":
        _check_length(_length(left) + _length(right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = right * left.bit_length() if operator == "**" else left.bit_length()
        if max(bits, right.bit_length()) > _BITS:
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
    # Jinja's own filter escapes HTML; transformers' doesn't.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(f"the chat template refuses the conversation: {_one_line(message)}")


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]
