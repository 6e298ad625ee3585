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
        ("{{ 'a' * 100000000 }}", "the length of a repetition must be at most"),
        ("{{ [0] * 100000000 }}", "the length of a repetition must be at most"),
        ("{{ 2 ** 100000 }}", "the bits of a power must be at most 4096"),
        (DOUBLING.replace("EXPRESSION", "ns.s ~ ns.s"), "length of a text must be"),
        (DOUBLING.replace("EXPRESSION", "ns.s + ns.s"), "length of a text or list must"),
        (
            DOUBLING.replace("EXPRESSION", "ns.s | replace('a', 'aa')"),
            "length of a text or list must",
        ),
        ("{{ 'a' | center(100000000) }}", "an integer argument of a filter must be"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "length of the prompt must be"),
    ],
)
def test_texts_that_grow_are_refused(source: str, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source", ["{{ 1e999 ** 2 }}", "{{ 'a' | dictsort }}", "{{ 'a' | truncate(0) }}"]
)
def test_an_error_in_code_of_jinja_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(RequestError, match="messages do not fit the model's chat template"):
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
