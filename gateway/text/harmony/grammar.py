"""Grammars of answers in the Harmony format of gpt-oss.

Reasoning and text before tool calls are always allowed. Tools constrain the calls; structured
output constrains the text of the channel ``final``. Text cannot contain special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cluster.core.errors import RequestError
from gateway.core.field_checks import require
from gateway.core.tool_use import ToolUse
from gateway.text.harmony.special_tokens import (
    ANALYSIS,
    CALL,
    CHANNEL,
    COMMENTARY,
    CONSTRAIN,
    END,
    FINAL,
    FUNCTIONS,
    MESSAGE,
    OPENED,
    ROLE,
    START,
    read_header,
)
from gateway.text.tool_formats.call_grammar import (
    ANY_TEXT,
    FIELD,
    GrammarRule,
    answer_rule,
    call_rules,
    check_combinable_with_tools,
    lark_grammar,
    terminal,
)
from workers.requests.request import Grammar

_NEEDED = (CHANNEL, MESSAGE, CONSTRAIN, START, END, CALL)


def harmony_grammar(
    use: ToolUse | None,
    special_ids: Mapping[str, int],
    answer: Grammar | None,
    opened: str = OPENED,
) -> Grammar | None:
    """Return the grammar of an answer in the Harmony format; None allows any text.

    Only the last message may be a call. If the vocabulary lacks the special tokens of the format,
    the grammar is ``answer``.

    Args:
        use: the tools; None without tools.
        special_ids: ids of the special tokens by text.
        answer: grammar of the text of the channel ``final``; None for any text.
        opened: header of the message that the prompt leaves open and the answer continues.

    Raises:
        RequestError: the tools are too large, or cannot be combined with ``answer`` or this
            vocabulary; or the prompt ends within a header.
    """
    if use is not None:
        check_combinable_with_tools(answer)
    if not all(one in special_ids for one in _NEEDED):
        return _grammar_without_tokens(use, answer)
    if use is None and answer is None:
        return None
    if opened not in ("", OPENED) and not opened.endswith(MESSAGE):
        field = FIELD if answer is None else answer.field
        raise RequestError(f"{field} cannot be used with a prompt that ends within a header", field)
    lines: list[GrammarRule | str] = [
        *_start_rules(use, special_ids, opened),
        *_message_rules(special_ids),
    ]
    body_grammar = None if use is not None and use.must_call else answer
    lines += ["body: TEXT"] if body_grammar is None else ["body: answer", answer_rule(body_grammar)]
    if use is not None:
        lines += _tool_rules(use, special_ids)
    field = FIELD if use is not None or answer is None else answer.field
    return lark_grammar(lines, field)


def _grammar_without_tokens(use: ToolUse | None, answer: Grammar | None) -> Grammar | None:
    if use is None:
        return answer
    reason = "needs a model with the special tokens of the Harmony format"
    require(not use.must_call, "tool_choice", reason)
    if answer is not None:
        raise RequestError(f"{answer.field} with tools {reason}", answer.field)
    return None


def _start_rules(use: ToolUse | None, special_ids: Mapping[str, int], opened: str) -> list[str]:
    """Return the rules for the start of an answer: ``<|start|>``, a header or message text."""
    must_call = use is not None and use.must_call
    ends = ["final"] * (not must_call) + ["call"] * (use is not None)
    turn = f"turn: before* ({' | '.join(ends)})"
    if not opened:
        return ["start: next turn", turn]
    if not opened.endswith(MESSAGE):
        return ["start: turn", turn]
    if not read_header(opened).is_content or must_call:
        return ["start: TEXT end next turn", turn]
    return ["start: body" if use is None else "start: body | TEXT end next before* call"]


def _message_rules(special_ids: Mapping[str, int]) -> list[str]:
    channel, message, start, end = (
        terminal(m, special_ids) for m in (CHANNEL, MESSAGE, START, END)
    )
    return [
        f'next: {start} "{ROLE}"',
        f"end: {end}",
        f'before: {channel} ("{ANALYSIS}" | "{COMMENTARY}") {message} TEXT end next',
        f'final: {channel} "{FINAL}" {message} body',
        f"TEXT: {ANY_TEXT}",
    ]


def _tool_rules(use: ToolUse, special_ids: Mapping[str, int]) -> list[GrammarRule]:
    channel, constrain, message, call = (
        terminal(m, special_ids) for m in (CHANNEL, CONSTRAIN, MESSAGE, CALL)
    )
    expressions_around: dict[str, tuple[str, str]] = {}
    for tool in use.allowed:
        to = json.dumps(f"{COMMENTARY} to={FUNCTIONS}{tool.name} ")
        expressions_around[tool.name] = f'{channel} {to} {constrain} "json" {message}', call
    return call_rules(use.allowed, expressions_around)
