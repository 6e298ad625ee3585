"""A checkpoint's template that would run or grow without end is refused in bounded time."""

from __future__ import annotations

import pytest

from cluster.core.errors import RequestError
from gateway.text import template_limits
from gateway.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
DOUBLING = (
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = EXPRESSION %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ 'a' * 100000000 }}", "a repetition has more"),
        ("{{ [0] * 100000000 }}", "a repetition has more"),
        ("{{ 2 ** 100000 }}", "a power has more"),
        (DOUBLING.replace("EXPRESSION", "ns.s ~ ns.s"), "a text has more"),
        (DOUBLING.replace("EXPRESSION", "ns.s + ns.s"), "a text has more"),
        (DOUBLING.replace("EXPRESSION", "ns.s | replace('a', 'aa')"), "a text has more"),
        ("{{ 'a' | center(100000000) }}", "a width has more"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "the prompt has more"),
    ],
)
def test_texts_that_grow_are_refused(source: str, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        ChatTemplate(source).render(MESSAGES)


def test_loops_end_with_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "TIME_LIMIT_S", 0.05)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match=r"it takes more than 0\.05 s"):
        ChatTemplate(loops).render(MESSAGES)


def test_what_templates_do_is_as_before() -> None:
    source = (
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ 1 ~ none ~ missing }}"
        "{{ 'x' * 3 }}{{ 1 + 2 }}{{ 'a' + 'b' }}{{ 2 ** 3 }}{{ ['a', 'b'] | join(', ') }}"
        "{{ 'abc' | replace('b', 'B') | center(5) }}|{{ '%s-%s' | format(1, 2) }}"
        "{% for k in [1, 2] if k > 1 recursive %}{{ loop.index }}{{ k }}{% else %}none{% endfor %}"
        "{% for k in [] %}{% else %}none{% endfor %}"
    )
    assert ChatTemplate(source).render(MESSAGES) == "<a>1Nonexxx3ab8a, b aBc |1-212none"
