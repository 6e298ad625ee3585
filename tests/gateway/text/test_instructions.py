"""Several system and developer messages, and late ones, in templates that do not take them."""

from __future__ import annotations

import pytest

from gateway.text.chat_template import ChatTemplate
from gateway.text.instructions import with_all_as_user, with_late_ones_as_user

ANY_ROLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ONE_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message may only come first') }}{% endif %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
LATE_ONES_LEFT_OUT = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
    "{% for m in messages if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)
ALTERNATING = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
S, D, U, A = (
    {"role": role, "content": text}
    for role, text in (("system", "s"), ("developer", "d"), ("user", "u"), ("assistant", "a"))
)
STRICT = (ONE_FIRST, LATE_ONES_LEFT_OUT, ALTERNATING)


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        (ANY_ROLE, [S, D, U, A, S, U], "<system>s<developer>d<user>u<assistant>a<system>s<user>u"),
        *((source, [S, U, A], "<system>s<user>u<assistant>a") for source in STRICT),
        *((source, [S, S, U], "<system>s\n\ns<user>u") for source in STRICT),
        *((source, [D, S, U], "<system>d\n\ns<user>u") for source in STRICT),
        *((source, [D, U], "<system>d<user>u") for source in STRICT),
        *(
            (source, [S, U, A, S, U], "<system>s<user>u<assistant>a<user>s\n\nu")
            for source in STRICT
        ),
        *((source, [U, A, D, D, U], "<user>u<assistant>a<user>d\n\nd\n\nu") for source in STRICT),
        *((source, [U, S, A, U], "<user>u\n\ns<assistant>a<user>u") for source in STRICT),
        *((source, [U, A, S], "<user>u<assistant>a<user>s") for source in STRICT),
        (NO_SYSTEM, [S, U, A, U], "<user>s\n\nu<assistant>a<user>u"),
        (NO_SYSTEM, [S, D, U, A, S, U], "<user>s\n\nd\n\nu<assistant>a<user>s\n\nu"),
    ],
)
def test_every_instruction_reaches_the_model(
    source: str, messages: list[dict[str, str]], text: str
) -> None:
    assert ChatTemplate(source).render(messages, add_generation_prompt=False) == text


def test_parts_of_content_stay_where_they_are() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "u"}]}
    as_user = {"role": "user", "content": "s"}
    assert with_late_ones_as_user([U, S, parts]) == [{**U, "content": "u\n\ns"}, parts]
    assert with_all_as_user([S, parts]) == [as_user, parts]
