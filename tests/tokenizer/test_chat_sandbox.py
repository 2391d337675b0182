"""What chat templates may do: all that published ones do, but no escape from the sandbox and no runaway."""

from datetime import datetime

import pytest
from chat_cases import NOW, said, text_of
from transformers.utils import chat_template_utils

from sharded_llama.errors import RequestError, TokenizerError
from sharded_llama.tokenizer.chat import budget, compile_chat_template
from sharded_llama.tokenizer.chat.template import MAX_TEMPLATE_CHARS


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ [messages] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{0.__class__.__mro__}' | attr('format') | string }}{{ ('{0.__class__}' | attr('format'))('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace.mro() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].clear() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'x'.encode().hex() }}",
        "{{ (1).to_bytes(1000000, 'big') }}",
        "{{ nothing.at.all }}",
        "{{ lipsum() }}",
    ],
)
def test_escapes_are_refused(source):
    messages = said(("user", "hi"))
    with pytest.raises(RequestError, match="the chat template failed"):
        text_of(source, messages)
    assert messages == said(("user", "hi"))


@pytest.mark.parametrize("source", ["{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
                                    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
                                    "{% autoescape true %}{% endautoescape %}"])  # fmt: skip
def test_other_templates_are_out_of_reach(source):
    with pytest.raises(TokenizerError, match=r"line 1: .* is not available in chat templates"):
        compile_chat_template(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{{ x | no_such_filter }}", "{{ " + "(" * 5000 + "}}",
                                    "x" * (MAX_TEMPLATE_CHARS + 1), "{{ " + "9" * 9999 + " }}"])  # fmt: skip
def test_what_is_no_template(source):
    with pytest.raises(TokenizerError, match="here"):
        compile_chat_template(source, where="here")


RUNAWAYS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(10 ** 9) %}x{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ ([0] * 1000 * 1000 * 1000) | length }}",
    "{{ 10 ** 99999999999 }}",
    "{% set n = namespace(a=9) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "{% set n = namespace(a='ab') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{% set n = namespace(a='ab') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n.a = {'a': n.a, 'b': n.a} %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a %}{{ n.a }}{{ n.a }}{% endset %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a.replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a | replace('', n.a) %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = (n.a, n.a) | join(n.a) %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a.join([n.a, n.a]) %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = '{0}{0}'.format(n.a) %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = '%(a)s%(a)s' % {'a': n.a} %}{% endfor %}",
    "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = '%s%s' | format(n.a, n.a) %}{% endfor %}",
    "{% macro m() %}{{ m(varargs, varargs) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for a in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "{% set n = namespace(a=1) %}{% for i in range(101) %}{% set n.a = (n.a,) %}{% endfor %}",
    "{% set n = namespace(a={}) %}{% for i in range(101) %}{% set n.a = {1: n.a.values()} %}{% endfor %}",
    "{{ 'x'.ljust(10 ** 11) }}",
    "{{ 'x'.center(width=10 ** 11) }}",
    "{{ 'x' | indent(10 ** 11, true) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (99999999999, 1) }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 99999999999) }}",
    "{{ messages | tojson(indent=10 ** 11) }}",
    "{{ 1.5 | round(10 ** 10, 'floor') }}",
    "{{ ([[1]] * 1000000) | sum(start=[]) | length }}",
    "{{ range(99999) | map('list') | list }}{{ ([range(99999)] * 999) | map('list') | list | length }}",
    "{% set ns = namespace() %}{% set ns.ns = ns %}{% for i in range(99999) %}{{ [ns] * 99999 }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", RUNAWAYS)
def test_runaways_end(source, monkeypatch):
    monkeypatch.setattr(budget, "MAX_WORK", 1 << 20)
    monkeypatch.setattr(budget, "MAX_VALUE", 1 << 18)
    with pytest.raises(
        RequestError, match=r"the chat template (takes|make|made|pads|indents|formats|rounds|sums|failed)"
    ):
        text_of(source)


def test_runaways_end_by_processor_time(monkeypatch):
    monkeypatch.setattr(budget, "MAX_CPU_SECONDS", 0.0)
    with pytest.raises(RequestError, match="takes too long"):
        text_of("{% for a in range(9) %}{% endfor %}")


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(budget, "MAX_VALUE", 1000)
    assert len(text_of("{% for i in range(100) %}{{ 'x' * 10 }}{% endfor %}")) == 1000
    with pytest.raises(RequestError, match="more than 1000 characters of the messages"):
        text_of("{% for i in range(101) %}{{ 'x' * 10 }}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': [1, 'é<&>']} | tojson }}", '{"a": [1, "é<&>"]}'),
        ("{{ ['é'] | tojson(ensure_ascii=True, separators=(',', ':')) }}", '["\\u00e9"]'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{% for a, b in {'x': 1, 'y': 2}.items() %}{{ loop.index }}/{{ loop.length }}{{ a }}{{ b }}{{ loop.last }} "
         "{% endfor %}", "1/2x1False 2/2y2True "),
        ("{% for i in [1, 2, 3] if i != 2 %}{{ loop.previtem }}{{ i }}{% else %}none{% endfor %}", "113"),
        ("{% for i in [] %}{{ i }}{% else %}none{% endfor %}", "none"),
        ("{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is not number else i }},{% endfor %}", "1,2,3,,,"),
        ("{% set (a, b), c = ('x', 'y'), {'k': ('z',)} %}{{ a ~ b ~ c.k[0] ~ none ~ 1.5 }}", "xyzNone1.5"),
        ("{{ ['b', 'a'] | sort | join('-') }} {{ [{'n': 'x'}, {'n': 'y'}] | join(', ', attribute='n') }}", "a-b x, y"),
        ("{{ 'a\nb' | indent(2) }} {{ 'aXbX' | replace('X', '--', 1) }} {{ [1, 2.5] | sum }}", "a\n  b a--bX 3.5"),
        ("{{ '%s-%03d' % ('a', 7) }} {{ '{:>4}{b}'.format('x', b=2) }} {{ '%(n)s' | format(n=3) }}", "a-007    x2 3"),
        ("{{ (messages | selectattr('role', 'equalto', 'user') | list | length) + ('4' | int) }}", "5"),
        ("{{ '<b>' | e }}{{ '<b>' | safe + '<' }}{{ 2 ** 10 // 3 % 100 }}", "&lt;b&gt;<b><41"),
        ("{{ dict(a=1, **{'b': 2}) | dictsort }}{{ 'a,b'.split(',')[::-1] }}", "[('a', 1), ('b', 2)]['b', 'a']"),
        ("{% macro m(x) %}[{{ x }}{{ caller() }}]{% endmacro %}{% call m(1) %}!{% endcall %}", "[1!]"),
        ("{% filter upper %}a{% endfilter %}{% set x %}b{% endset %}{{ x }}{% with y=1 %}{{ y }}{% endwith %}", "Ab1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}\n", "hi"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc {{ tools }} {{ documents }}", "a\n  b\nc None None"),
    ],
)  # fmt: skip
def test_what_templates_use(source, expected):
    assert text_of(source) == expected
    # And so says transformers, whose `safe` alone is another matter: it escapes what is added to it.
    if "safe" not in source:
        (theirs,), _ = chat_template_utils.render_jinja_template(
            [said(("user", "hi"))], chat_template=source, bos_token="<s>"
        )
        assert theirs == expected


def test_a_refusal_of_the_template():
    with pytest.raises(RequestError, match="the chat template refuses the messages: no users here"):
        text_of("{{ raise_exception('no users here') }}")


def test_the_date():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert text_of(source, date=NOW) == "29 Feb 2024"
    assert text_of(source, date=datetime(2031, 12, 1)) == "01 Dec 2031"
