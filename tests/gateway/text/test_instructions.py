"""Several system and developer messages, and late ones, in templates that do not take them."""

from __future__ import annotations

import pytest

from gateway.text.chat_template import ChatTemplate
from gateway.text.instructions import instructions_to_user, late_instructions_to_user

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
LAST_COUNTS = (
    "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endfor %}<system>{{ ns.system }}"
    "{% for m in messages if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)
BEFORE_USER = ALTERNATING.replace("<system>{{ messages[0].content }}", "").replace(
    "{{ m.content }}",
    "{{ messages[0].content ~ ';' if loop.first and rest | length < messages | length }}"
    "{{ m.content }}",
)
"""Shows a system message within the first turn of the user."""
WITH_TOOLS = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
    "{% set ns = namespace(number=0) %}{% for m in rest %}"
    "{% if m.role != 'tool' and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.number % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.number = ns.number + 1 %}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
"""As Mistral's: no turn of the user may follow the result of a tool."""
S, D, U, A = (
    {"role": role, "content": text}
    for role, text in (("system", "s"), ("developer", "d"), ("user", "u"), ("assistant", "a"))
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "x"}
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
        *((source, [U, S, U], "<user>u\n\ns\n\nu") for source in STRICT),
        *((source, [S, U, D, S, U], "<system>s<user>u\n\nd\n\ns\n\nu") for source in STRICT),
        (LAST_COUNTS, [S, U], "<system>s<user>u"),
        (LAST_COUNTS, [S, U, A, S, U], "<system>s<user>u<assistant>a<user>s\n\nu"),
        (LAST_COUNTS, [U, S, A, S, U], "<system><user>u\n\ns<assistant>a<user>s\n\nu"),
        (BEFORE_USER, [S, U], "<user>s;u"),
        (BEFORE_USER, [S], "<user>s"),
        (BEFORE_USER, [D, S], "<user>d\n\ns"),
        (WITH_TOOLS, [S, U, CALL, RESULT, S], "<system>s\n\ns<user>u<assistant><tool>r"),
        (WITH_TOOLS, [U, CALL, D, RESULT, A], "<system>d<user>u<assistant><tool>r<assistant>a"),
        (
            WITH_TOOLS,
            [U, CALL, S, RESULT, A, U],
            "<system>s<user>u<assistant><tool>r<assistant>a<user>u",
        ),
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
    assert late_instructions_to_user([U, S, parts]) == [{**U, "content": "u\n\ns"}, parts]
    assert instructions_to_user([S, parts]) == [as_user, parts]


def test_results_stay_next_to_their_calls() -> None:
    as_user = {"role": "user", "content": "s"}
    assert instructions_to_user([U, CALL, S, RESULT, A]) == [U, CALL, RESULT, as_user, A]


def test_instructions_without_text_add_nothing() -> None:
    assert instructions_to_user([U, A, {**S, "content": ""}, U]) == [U, A, U]


def test_tools_of_one_client_do_not_move_instructions_of_another() -> None:
    """What a template does with a role is found once, for the tools of all clients."""
    messages = [S, U, A, S, U]
    shown = "{% for t in tools or [] %}{{ t.function.description }}{% endfor %}"
    source = LATE_ONES_LEFT_OUT + shown
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    expected = ChatTemplate(source).render(messages, tools=[tool])
    assert expected.endswith("<user>s\n\nu")
    probes = " ".join(f"expertmesh-probe-{index}-" for index in range(len(messages) + 2))
    template = ChatTemplate(source)
    template.render(messages, tools=[{**tool, "function": {"description": probes}}])
    assert template.render(messages, tools=[tool]) == expected
