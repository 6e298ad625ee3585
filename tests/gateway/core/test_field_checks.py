"""Checks of fields that need no model: what they refuse, by which name, and what still passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import CallKind, ChatInput, GenerateCall
from gateway.core.field_checks import (
    MAX_PARTS,
    Range,
    check_fields,
    check_messages,
    check_range,
    check_stream,
    require_one_of,
)
from gateway.core.tool_use import Tool
from gateway.text.tool_formats.tools import make_tool_use
from workers.requests.prompt_embeds import parse_embeds
from workers.requests.request import Grammar, GrammarKind

LIMITS = dataclasses.replace(GatewaySection(), max_choices=4)
PLAIN = GenerateCall(kind=CallKind.COMPLETION, prompts=("x",))
CHAT = GenerateCall(kind=CallKind.CHAT, chat=ChatInput(messages=({"role": "user"},)))


def check(fields: GenerateCall = PLAIN, **values: Any) -> None:
    check_fields(dataclasses.replace(fields, **values), LIMITS)


@pytest.mark.parametrize(
    "values",
    [
        {"min_tokens": 0},
        {"min_tokens": 5},
        {"min_tokens": 4, "max_tokens": 4},
        {"min_tokens": 3, "max_tokens": 4},
        {"prompts": ("x", "y"), "n": 2},
        {"stop": ("x",)},
        {"cache_salt": "x"},
        {"logprob_token_ids": (4, 7)},
        {"logprob_token_ids": (4, 7), "logprobs": 2},
        {"allowed_token_ids": (7,)},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": 1},
        {"truncate_prompt_tokens": 2**31 - 1},
        {"truncation_side": "left"},
    ],
)
def test_what_is_within_the_rules_passes(values: dict[str, Any]) -> None:
    check(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens \(0\) must be at least 1 \(0 needs echo\)$"),
        ({"max_tokens": -1}, r"max_tokens \(-1\) must be at least 1$"),
        ({"max_tokens": -1, "echo": True}, r"max_tokens \(-1\) must be at least 0$"),
        (
            {"max_tokens": 2**63},
            r"max_tokens \(9223372036854775808\) must be .* at most 922337",
        ),
        (
            {"min_tokens": 2**63},
            r"min_tokens \(9223372036854775808\) must be .* at most 922337",
        ),
        ({"prompts": ("x",) * 3, "n": 2}, r"prompts times n \(6\) must be at most 4"),
        ({"prompts": ("x",) * 3, "best_of": 2}, r"prompts times best_of \(6\) must be at most 4"),
        ({"logprob_token_ids": (4, 4)}, "logprob_token_ids must not name a token twice"),
        ({"logprob_token_ids": (4, 7), "logprobs": 1}, r"logprobs \(1\) must be the same or unset"),
        ({"logprob_token_ids": (4,), "echo": True}, "logprob_token_ids cannot be used with echo"),
        ({"allowed_token_ids": ()}, "allowed_token_ids must not be empty"),
        ({"truncate_prompt_tokens": 0}, r"truncate_prompt_tokens \(0\) must be -1 or at least 1"),
        ({"truncate_prompt_tokens": -2}, r"truncate_prompt_tokens \(-2\)"),
        ({"truncate_prompt_tokens": 2**31}, r"truncate_prompt_tokens \(2147483648\)"),
        ({"truncation_side": "middle"}, r"truncation_side \('middle'\) must be left or right"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(**values)


BEAMS = dataclasses.replace(PLAIN, use_beam_search=True, n=3)


@pytest.mark.parametrize(
    "values",
    [
        {"length_penalty": 2.0, "early_stopping": "never"},
        {"length_penalty": -10, "early_stopping": "true"},
        {"temperature": 0, "top_p": 1.0, "top_k": -1, "min_p": 0, "repetition_penalty": 1},
        {"temperature": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0, "seed": 7},
        {"logprobs": 5, "min_tokens": 3, "stop_token_ids": (5,), "ignore_eos": True},
        {"echo": True, "best_of": 4, "include_stop_str_in_output": True},
    ],
)
def test_what_beams_can_follow_passes(values: dict[str, Any]) -> None:
    check(BEAMS, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.7}, "^temperature cannot be used with use_beam_search$"),
        ({"top_p": 0.9}, "^top_p cannot"),
        ({"top_k": 5}, "^top_k cannot"),
        ({"min_p": 0.1}, "^min_p cannot"),
        ({"frequency_penalty": 1}, "^frequency_penalty cannot"),
        ({"presence_penalty": 1}, "^presence_penalty cannot"),
        ({"repetition_penalty": 1.1}, "^repetition_penalty cannot"),
        ({"logit_bias": ((5, 1.0),)}, "^logit_bias cannot"),
        ({"allowed_token_ids": (5,)}, "^allowed_token_ids cannot"),
        ({"bad_words": ("a",)}, "^bad_words cannot"),
        ({"stop": ("a",), "stop_name": "stop_sequences"}, "^stop_sequences cannot"),
        ({"grammar": Grammar(kind=GrammarKind.REGEX, text="a")}, "^structured_outputs cannot"),
        ({"prompt_logprobs": 0}, "^prompt_logprobs cannot"),
        ({"logprob_token_ids": (5,)}, "^logprob_token_ids cannot"),
        ({"echo": True, "logprobs": 0}, "^echo with logprobs cannot be used with use_beam_search$"),
        ({"echo": True, "max_tokens": 0}, r"^max_tokens \(0\) must be at least 1 with use_beam"),
        ({"early_stopping": "maybe"}, r"^early_stopping \('maybe'\) must be false, true or never$"),
        ({"length_penalty": 11}, r"^length_penalty \(11\) must be at least -10 and at most 10$"),
        ({"n": 17}, r"^n \(17\) must be at least 1 and at most 16$"),
        ({"best_of": 2}, r"^best_of \(2\) must be at least n \(3\)$"),
    ],
)
def test_what_beams_cannot_follow_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(BEAMS, **values)


def test_tools_cannot_go_with_beams() -> None:
    tools = make_tool_use([Tool(name="f")])
    chat = dataclasses.replace(CHAT, use_beam_search=True, chat=_chat(False, True))
    check(chat)
    with pytest.raises(RequestError, match="tools cannot be used with use_beam_search"):
        check(chat, chat=dataclasses.replace(_chat(False, True), tools=tools))


@pytest.mark.parametrize("values", [{"length_penalty": 0.5}, {"early_stopping": "true"}])
def test_fields_of_beams_need_beams(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(RequestError, match=rf"^{name} \(.*\) needs use_beam_search to be true$"):
        check(**values)
    neutral: dict[str, Any] = {"length_penalty": 1.0, "early_stopping": "false"}
    check(**neutral)


def test_beams_are_not_streamed() -> None:
    with pytest.raises(RequestError, match="use_beam_search cannot be used with a stream"):
        check_stream(BEAMS)


def test_embeddings_are_not_truncated() -> None:
    embeds = parse_embeds((1, 2), bytes(8))
    check(embeds=embeds)
    with pytest.raises(RequestError, match="truncate_prompt_tokens cannot be used with embeddings"):
        check(embeds=embeds, truncate_prompt_tokens=5)


def test_a_chat_has_no_ranked_choices() -> None:
    check(n=2, best_of=3)
    check(CHAT, n=2, best_of=2)
    with pytest.raises(UnsupportedParameterError, match="best_of is not supported"):
        check(CHAT, n=2, best_of=3)


def test_ranked_choices_are_not_streamed() -> None:
    check_stream(PLAIN)
    check_stream(dataclasses.replace(PLAIN, n=2))
    check_stream(dataclasses.replace(PLAIN, n=2, best_of=2))
    check_stream(dataclasses.replace(CHAT, best_of=3))  # refused as a whole
    with pytest.raises(RequestError, match="best_of cannot be used with a stream"):
        check_stream(dataclasses.replace(PLAIN, n=2, best_of=3))


def test_a_conversation_either_continues_or_begins_an_answer() -> None:
    for continues, begins in ((True, False), (False, True), (False, False)):
        check(CHAT, chat=_chat(continues, begins))
    with pytest.raises(RequestError, match="cannot both be true"):
        check(CHAT, chat=_chat(True, True))


def _chat(continues: bool, begins: bool) -> ChatInput:
    return ChatInput(
        messages=({"role": "user"},),
        continue_final_message=continues,
        add_generation_prompt=begins,
    )


def test_messages_may_have_so_many_parts() -> None:
    check_messages(1, MAX_PARTS)
    with pytest.raises(RequestError, match=f"messages have {MAX_PARTS + 1} fields"):
        check_messages(1, MAX_PARTS + 1)


def test_one_of_several_fields_is_given() -> None:
    assert require_one_of(input=None, inputs=0) == "inputs"
    with pytest.raises(RequestError, match="one of input and inputs is required") as caught:
        require_one_of(input=None, inputs=None)
    assert (caught.value.param, caught.value.code) == ("input", "missing_required_parameter")
    with pytest.raises(RequestError, match="a and b and c cannot be set together") as caught:
        require_one_of(a=None, b=1, c=2)
    assert caught.value.param == "b"


def test_a_long_number_is_shown_by_its_beginning() -> None:
    for digits, shown in ((32, "9" * 32), (33, f"{'9' * 32}...")):
        with pytest.raises(RequestError) as caught:
            check_range("seed", int("9" * digits), Range(0, 1))
        assert str(caught.value) == f"seed ({shown}) must be at least 0 and at most 1"
