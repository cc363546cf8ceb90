"""Templates that try to take all time or memory: each is stopped at once, with one line."""

import time

import jinja2.filters
import pytest

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text import template_budget
from gemma_runtime.text.template import render_template
from tests.fuzz.judge import MOST_BYTES, judge, reset_peak

_LONG, _TOO_LONG = "('a' * 999999)", "a text or list longer"
_WIDE = "a" * 9999
_LINES = "('\n' * 999999)"
_DOUBLED = (
    "{{% set ns = namespace(x=[1]) %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}"
    "{{{{ ns.x{} }}}}"
)
# What it makes, and the limit that stops it.
HOSTILE: list[tuple[str, str]] = [
    ("{{ 'x' | center(2000000000) }}", _TOO_LONG),
    ("{{ 'x'.center(2000000000) }}", _TOO_LONG),
    ("{{ 'x'.ljust(2000000000) }}{{ 'x'.rjust(1) }}", _TOO_LONG),
    ("{{ '1'.zfill(width=2000000000) }}", _TOO_LONG),
    ("{{ ('\t' * 1000).expandtabs(1000000) }}", _TOO_LONG),
    ("{{ 'x'.encode().center(2000000000) }}", _TOO_LONG),
    ("{{ 'x'.encode() * 2000000000 }}", _TOO_LONG),
    ("{{ (1).to_bytes(2000000000, 'big') }}", _TOO_LONG),
    (f"{{{{ {_LONG} | replace('a', {_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ {_LONG} | replace(new={_LONG}, old='a') }}}}", _TOO_LONG),
    (f"{{{{ {_LONG} | replace('', {_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ {_LONG}.replace('a', {_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ ('1' * 999999) | replace(1, {_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ {_LONG}.join({_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ {_LONG} | join({_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ range(9999) | map('string') | join({_LONG}) }}}}", _TOO_LONG),
    (f"{{{{ [{_LONG}] * 1000 }}}}", _TOO_LONG),
    (f"{{{{ {_LINES} | indent(999999, true, true) }}}}", _TOO_LONG),
    (f"{{{{ {_LINES} | indent({_LONG}) }}}}", _TOO_LONG),
    ("{{ '%2000000000d' % 1 }}", _TOO_LONG),
    ("{{ '%2000000000d' | format(1) }}", _TOO_LONG),
    ("{{ '%*d' % (2000000000, 1) }}", "width from an argument"),
    ("{{ '%.*f' % (2000000000, 1.0) }}", "width from an argument"),
    ("{{ '{:2000000000}'.format(1) }}", _TOO_LONG),
    ("{{ '{:{}}'.format(1, 2000000000) }}", "width from an argument"),
    ("{{ '{a:{b}}'.format_map({'a': 1, 'b': 2000000000}) }}", "width from an argument"),
    (f"{{{{ ('%s' * 9999) % ((({_LONG},)) * 9999) }}}}", _TOO_LONG),
    ("{{ ('a' * 99999).translate({97: 'a' * 99999}) }}", "translates"),
    ("{{ 1.5 | round(2000000000, 'floor') }}", "rounds to more"),
    ("{{ ([[1]] * 99999) | sum(start=[]) }}", "sums lists"),
    ("{{ messages | tojson(indent=2000000000) }}", "indents JSON"),
    (f"{{{{ messages | tojson(indent={_LONG}) }}}}", "indents JSON"),
    (f"{{{{ strftime_now({_LONG}) }}}}", "formats a date"),
    (_DOUBLED.format("[ns.x, ns.x]", ""), _TOO_LONG),
    (_DOUBLED.format("[ns.x, ns.x]", " | tojson"), _TOO_LONG),
    (_DOUBLED.format("(ns.x, ns.x)", " == 1"), _TOO_LONG),
    (_DOUBLED.format("{'a': ns.x, 'b': ns.x}", ""), _TOO_LONG),
    (_DOUBLED.format("dict(a=ns.x, b=ns.x)", ""), _TOO_LONG),
    (_DOUBLED.format("ns.x ~ ns.x", ""), _TOO_LONG),
    ("{% set ns = namespace(x=1) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}{% endfor %}",
     "nests lists more than 100"),
    (f"{{% set x %}}{{% for i in range(40000) %}}{{{{ {_LONG} }}}}{{% endfor %}}{{% endset %}}",
     "in all"),
    (f"{{% set x %}}{{% for i in range(999) %}}{_WIDE}{{% endfor %}}{{% endset %}}", _TOO_LONG),
    (f"{{% macro f() %}}{{{{ {_LONG} }}}}{{% endmacro %}}{{% for i in range(40000) %}}"
     "{% set x = f() %}{% endfor %}", "in all"),
    (f"{{% set x = {_LONG} %}}{{% for i in range(40000) %}}{{% set y = x[1:] %}}{{% endfor %}}",
     "in all"),
    ("{{ range(9999) | map('center', 999999) | list }}", "in all"),
    ("{{ ('f' * 9999) | int(base=16) }}", "bits"),
    ("{% for i in range(99999) %}" + "{{ i }}" * 2000 + "{% endfor %}", "steps|longer"),
    ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "bound"), HOSTILE)
def test_huge_results_are_refused_before_they_are_made(template: str, bound: str) -> None:
    """These took gigabytes, or hours within one call of a method, which nothing can interrupt."""
    names = {"messages": [{"role": "user", "content": "hi"}]}
    reset_peak()
    verdict = judge(lambda _: render_template(template, names), b"")
    assert verdict.problem is None
    assert not verdict.accepted
    assert verdict.added_bytes < MOST_BYTES
    with pytest.raises(TokenizerError, match=f"the chat template fails: .*({bound})"):
        render_template(template, names)


def test_a_namespace_in_itself_has_a_text() -> None:
    nested = "{% set n = namespace() %}{% set n.a = n %}{{ n }}"
    assert render_template(nested, {}) == "<Namespace>"


def test_slow_operations_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison of long lists takes milliseconds, and a template has room for thousands."""
    monkeypatch.setattr(template_budget, "_SECONDS", 0.3)
    source = "{% set a = [1] * 900000 %}{% set b = [1] * 900000 %}" + "{{ a == b }}" * 5000
    started = time.thread_time()
    with pytest.raises(TokenizerError, match=r"more than 0\.3 seconds"):
        render_template(source, {})
    assert time.thread_time() - started < 5


def test_what_templates_do_with_texts_gives_jinja_s_results() -> None:
    source = (
        "{{ 'ab' | center(6) }}|{{ 'a-b' | replace('-', '+') }}|{{ ['a', 1] | join(', ') }}|"
        "{{ '**%s** %05.1f' % ('x', 2) }}|{{ '{:>4}|{a}'.format(1, a=2) }}|"
        "{{ 'a\nb' | indent(2) }}|"
        "{{ [[1, 2], [3]] | map('sum') | list }}|{{ 2.345 | round(1) }}|{{ 'abc'[1:] }}|"
        "{{ {'a': (1, 2)} | tojson }}|{{ 'x'.join(['a', 'b']) }}|{{ 3 in [1, 3] and 2 is even }}|"
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('é') }}{% set y %}a{{ 1 }}{% endset %}{{ y }}|"
        "{{ 'a.b'.split('.') | reverse | list }}|{{ '%d%%' | format(5) }}|{{ 'Ab' | upper | trim }}"
    )
    assert render_template(source, {}) == (
        "  ab  |a+b|a, 1|**x** 002.0|   1|2|a\n  b|[3, 3]|2.3|bc|"
        "{\"a\": [1, 2]}|axb|True|<é>a1|['b', 'a']|5%|AB"
    )


def test_every_filter_of_jinja_is_known_here() -> None:
    """A new filter may make huge texts of small ones: look at it, then add its name."""
    known = """abs attr batch capitalize center count d default dictsort e escape filesizeformat
    first float forceescape format groupby indent int join last length list lower items map min
    max pprint random reject rejectattr replace reverse round safe select selectattr slice sort
    string striptags sum title trim truncate unique upper urlencode urlize wordcount wordwrap
    xmlattr tojson"""
    assert set(jinja2.filters.FILTERS) <= set(known.split())
