"""Grammars of answers: well-formed tool calls or structured output, after optional reasoning.

Harmony has separate grammars (``gateway.text.harmony.grammar``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from gateway.core.thinking import BEGIN, END, Thinking
from gateway.core.tool_use import ToolCallFormat, ToolUse
from gateway.text.tool_formats.call_grammar import (
    ANY_TEXT,
    FIELD,
    GrammarRule,
    answer_rule,
    call_rules,
    check_combinable_with_tools,
    lark_grammar,
    object_rules,
    terminal,
    text_up_to,
)
from gateway.text.tool_formats.call_syntax import SYNTAXES, CallSyntax, Placeholder
from gateway.text.tool_formats.pair_grammar import BREAK, BREAK_RULE, PairRules, parts_expression
from workers.requests.request import Grammar

_NUMBER = "/[0-9]{1,3}/"
_GAP = "gap: /[ \\n]{1,8}/"


def answer_grammar(
    use: ToolUse | None,
    form: ToolCallFormat,
    token_ids: Mapping[str, int],
    answer: Grammar | None,
    thinking: Thinking | None = None,
) -> Grammar | None:
    """Return the grammar of an answer: free text, ``answer`` or tool calls. None allows any text.

    Args:
        use: the tools, and whether one must be called; None without tools.
        form: format of the calls.
        token_ids: ids by text of the tokens that grammars refer to by id. No other tokens can
            produce these texts.
        answer: grammar of an answer that is not a call.
        thinking: where unconstrained reasoning begins; None without reasoning.

    Raises:
        RequestError: the tools are too large, or cannot be combined with ``answer``.
    """
    if use is None and (answer is None or thinking is None):
        return answer
    if use is not None:
        check_combinable_with_tools(answer)
        answer = None if use.must_call else answer
    allows_text = answer is None and (use is None or not use.must_call)
    before, reasoning = _reasoning_rules(thinking, token_ids, allows_text)
    lines: list[GrammarRule | str] = [*reasoning]
    if use is None:
        body = "answer"
    else:
        body, more_rules = _answer_body(use, SYNTAXES[form], token_ids, answer)
        lines += more_rules
    if answer is not None:
        lines.append(answer_rule(answer))
    rules = [f"start: {before} ({body})", f"TEXT: {ANY_TEXT}", *lines]
    field = answer.field if use is None and answer is not None else FIELD
    return lark_grammar(rules, field)


def _reasoning_rules(
    thinking: Thinking | None, token_ids: Mapping[str, int], allows_text: bool
) -> tuple[str, list[str]]:
    """Return a grammar expression for reasoning at the start of an answer, and its rules.

    The expression is empty if the grammar needs no rule for reasoning.

    Args:
        allows_text: whether free text may follow, which includes reasoning without tag tokens.
    """
    needed = END if thinking is Thinking.OPEN else BEGIN
    if thinking is None or (allows_text and needed not in token_ids):
        return "", []
    reasoning, lines = text_up_to(END, token_ids, "thought")
    if not allows_text:
        reasoning, lines = f"{reasoning} gap?", [*lines, _GAP]
    if thinking is Thinking.OPEN:
        return reasoning, lines
    opening = (
        f"gap? {terminal(BEGIN, token_ids)}"
        if not allows_text
        else f"BREAK? {terminal(BEGIN, token_ids)}"
    )
    return "think?", [*lines, f"think: {opening} {reasoning}"]


def _answer_body(
    use: ToolUse, syntax: CallSyntax, token_ids: Mapping[str, int], answer: Grammar | None
) -> tuple[str, list[GrammarRule | str]]:
    """Return a grammar expression for the answer after any reasoning, and its rules."""
    first = terminal(syntax.first_delimiter, token_ids)
    begin, next_begin = (
        terminal(text.strip(), token_ids)
        for text in (syntax.begin, syntax.next_begin or syntax.begin)
    )
    rest = f"{BREAK} {begin} call" if syntax.section else "call"
    if use.is_parallel:
        rest += f" ({BREAK} {next_begin} {BREAK if syntax.next_begin else ''} call)*"
    if syntax.section:
        rest += f" {BREAK} {terminal(syntax.section_end, token_ids)}"
    lines: list[GrammarRule | str] = [BREAK_RULE, *_tool_rules(use, syntax, token_ids)]
    if use.must_call:
        return f"{first} {rest}", lines
    if answer is not None:
        return f"answer | {first} {rest}", lines
    head, more_rules = text_up_to(syntax.first_delimiter, token_ids, "head")
    return f"TEXT | {head} {rest}", [*lines, *more_rules]


def _tool_rules(
    use: ToolUse, syntax: CallSyntax, token_ids: Mapping[str, int]
) -> list[GrammarRule]:
    """Return the grammar rule ``call`` (a call without its first delimiter), and its rules."""
    expressions_around: dict[str, tuple[str, str]] = {}
    for tool in use.allowed:
        substitutions = {
            Placeholder.NAME: json.dumps(tool.name),
            Placeholder.NUMBER: _NUMBER,
            Placeholder.BREAK: BREAK,
        }
        heads = (
            parts_expression(syntax.head, token_ids, substitutions),
            parts_expression(syntax.tail, token_ids, substitutions),
        )
        expressions_around[tool.name] = heads
    if syntax.pairs is None:
        return call_rules(use.allowed, expressions_around, object_rules)
    pairs = PairRules(syntax.pairs, token_ids)
    return [*call_rules(use.allowed, expressions_around, pairs.tool_rules), *pairs.shared_rules()]
