"""Rules for the output of a conversation: grammar, format of tool calls, reasoning."""

from __future__ import annotations

from dataclasses import replace

from gateway.calls.chat_renderer import RenderedChat
from gateway.core.call import ChatInput, GenerateCall
from gateway.core.thinking import BEGIN, END, Thinking, thinking_after
from gateway.core.tool_use import ToolCallFormat
from gateway.text.encoding import EncodedText
from gateway.text.harmony.grammar import harmony_grammar
from gateway.text.harmony.special_tokens import ENDS, MESSAGE, START, open_header, open_message
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_formats.answer_grammar import answer_grammar

_LAST_TOKENS = 16
"""Number of tokens at the end of a prompt that are searched for the delimiter of reasoning."""


def apply_output_rules(
    call: GenerateCall,
    chat: ChatInput,
    rendered: RenderedChat,
    encoded: EncodedText,
    tokenizer: Tokenizer,
) -> GenerateCall:
    """Copy a call with the rules for its output: grammar, format of tool calls, reasoning.

    Args:
        call: the call.
        chat: the conversation of the call.
        rendered: the rendered prompt.
        encoded: the tokens of the prompt, possibly truncated.
        tokenizer: the tokenizer with the delimiters of tool calls and reasoning.
    """
    ids, is_cut = encoded.ids, len(encoded.ids) < encoded.num_tokens
    if rendered.form is ToolCallFormat.HARMONY:
        return _with_harmony_rules(
            call, _open_message(rendered.text, ids, is_cut, tokenizer), tokenizer
        )
    thinking = None
    if rendered.has_thinking:
        thinking = _thinking(chat, rendered.text, ids, is_cut, tokenizer)
    return _with_tool_rules(call, rendered.form, thinking, tokenizer)


def _with_harmony_rules(call: GenerateCall, opened: str, tokenizer: Tokenizer) -> GenerateCall:
    """Copy a call with rules for output in the Harmony format.

    Args:
        opened: header of the Harmony message that the prompt leaves open.
    """
    special_ids = tokenizer.special_ids
    return replace(
        call,
        grammar=harmony_grammar(call.tools, special_ids, call.grammar, opened),
        tool_format=ToolCallFormat.HARMONY,
        open_message=opened,
        skip_special_tokens=False,
    )


def _with_tool_rules(
    call: GenerateCall, form: ToolCallFormat, thinking: Thinking | None, tokenizer: Tokenizer
) -> GenerateCall:
    """Copy a call with rules for output in any format except Harmony.

    Args:
        form: format of tool calls in the output.
        thinking: where reasoning begins in the output; None for no reasoning.
    """
    use = call.tools
    if use is None and thinking is None:
        return call
    has_marks = thinking is not None and not {BEGIN, END}.isdisjoint(tokenizer.special_ids)
    return replace(
        call,
        grammar=answer_grammar(use, form, tokenizer.grammar_token_ids, call.grammar, thinking),
        tool_format=None if use is None else form,
        thinking=thinking,
        skip_special_tokens=call.skip_special_tokens and use is None and not has_marks,
    )


def _thinking(
    chat: ChatInput, text: str, ids: tuple[int, ...], is_cut: bool, tokenizer: Tokenizer
) -> Thinking | None:
    """Return where reasoning begins in the output; None for no reasoning.

    ``ids`` are the tokens of the prompt ``text``; ``is_cut``: whether they are truncated.
    """
    last = chat.messages[-1] if chat.continue_final_message else None
    shown = None if last is None else str(last.get("content") or "")
    if is_cut and ids:
        text = tokenizer.decode(ids[-_LAST_TOKENS:], False)
    return thinking_after(text, shown)


def _open_message(text: str, ids: tuple[int, ...], is_cut: bool, tokenizer: Tokenizer) -> str:
    """Return the header of the message that a prompt in the Harmony format leaves open.

    Args:
        text: the whole prompt.
        ids: tokens of the prompt, possibly truncated.
        is_cut: whether ``ids`` are truncated.
    """
    special_ids = tokenizer.special_ids
    if all(mark in special_ids for mark in (START, MESSAGE, *ENDS)):
        return tokenizer.decode(open_header(ids, special_ids), skip_special_tokens=False)
    return open_message(tokenizer.decode(ids, skip_special_tokens=False) if is_cut else text)
