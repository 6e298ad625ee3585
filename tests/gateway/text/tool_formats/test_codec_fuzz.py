"""Streaming equals the whole in every protocol, for the answers of ``test_answer_fuzz``.

Each answer goes through the codecs of OpenAI's chat, Responses and Anthropic's Messages, at once
and cut between tokens; clients that put the events together have the same, and the same in all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.anthropic.format import MessageFormat
from gateway.calls.running_call import RunningCall
from gateway.core.call import CallKind, ChatInput, GenerateCall
from gateway.core.delta import ChoiceDelta, Finish, TokenText, Usage
from gateway.core.tool_use import ToolCallFormat
from gateway.http.openai_format import ChatFormat
from gateway.responses.format import OutputFormat
from gateway.responses.items import ItemIdGenerator
from gateway.responses.output import OutputBuilder
from gateway.responses.stream import merge_deltas
from tests.gateway.anthropic.test_messages import put_together
from tests.gateway.text.tool_formats.test_answer_fuzz import FORMS, MANY, Case, Writer, token_pieces
from workers.requests.request import FinishReason, Request

pytestmark = pytest.mark.heavy

FEW = 66
BORDERS = 12
_USAGE = Usage(prompt_tokens=1, completion_tokens=1)
_MAX_TOKENS = 1
"""As many as were drawn: what is cut was cut by the limit of the request."""
Told = list[tuple[str, ...]]
"""What a client has in the end: kinds and texts, in the protocol's order."""


def call_of(case: Case) -> GenerateCall:
    chat = ChatInput(messages=({"role": "user", "content": "hi"},), tools=case.use)
    return GenerateCall(
        model="tiny",
        kind=CallKind.CHAT,
        chat=chat,
        tool_format=case.form,
        thinking=case.thinking,
        open_message=case.opened,
        max_tokens=_MAX_TOKENS,
    )


def deltas_of(tokens: Sequence[str], cut: Sequence[int], reason: FinishReason) -> list[ChoiceDelta]:
    """One delta for as many tokens as each number of ``cut`` says; the last one has the end."""
    finish = Finish(reason=reason, stop_reason=None, usage=_USAGE, timings=None)
    offsets = [0, *accumulate(map(len, tokens))]
    deltas: list[ChoiceDelta] = []
    place = 0
    for count in cut:
        own = range(place, place + count)
        delta = ChoiceDelta(
            index=0,
            prompt_index=0,
            is_first=not deltas,
            text="".join(tokens[token] for token in own),
            tokens=tuple(TokenText(0, offsets[token]) for token in own),
            finish=finish if place + count == len(tokens) else None,
        )
        deltas.append(delta)
        place += count
    return deltas


def generation_of(case: Case) -> RunningCall:
    """What formats read of a generation."""
    requests = [Request(prompt=(1,))]
    known = SimpleNamespace(
        call=call_of(case), requests=requests, call_id="x", usage=_USAGE, created=0
    )
    return cast(RunningCall, known)


# ---- what clients make of each protocol -------------------------------------------------------


def chat_client(case: Case, deltas: list[ChoiceDelta]) -> Told:
    """A stream of chat completions, put together as openai-python does it."""
    formatter = ChatFormat(generation_of(case), None, "f")
    message: dict[str, Any] = {}
    reason = None
    for delta in deltas:
        for chunk in formatter.chunks(delta):
            (choice,) = chunk["choices"]
            _accumulate(message, choice["delta"])
            reason = choice["finish_reason"] or reason
    return _chat(message, reason)


def chat_whole(case: Case, delta: ChoiceDelta) -> Told:
    (choice,) = ChatFormat(generation_of(case), None, "f").response_body([delta], _USAGE)["choices"]
    return _chat(choice["message"], choice["finish_reason"])


def _chat(message: dict[str, Any], reason: object) -> Told:
    told: Told = [
        ("reasoning", message.get("reasoning_content") or ""),
        ("content", message.get("content") or ""),
    ]
    for call in message.get("tool_calls") or ():
        assert (call["type"], bool(call["id"])) == ("function", True)
        told.append((call["function"]["name"], call["function"]["arguments"]))
    return [*told, ("end", str(reason))]


def _accumulate(whole: dict[str, Any], delta: dict[str, Any]) -> None:
    """Entries of a new list are taken as they are; later ones go to those of their index."""
    for key, value in delta.items():
        if key not in whole or whole[key] is None:
            whole[key] = json.loads(json.dumps(value))
        elif key in ("index", "type"):
            whole[key] = value
        elif isinstance(value, str):
            whole[key] += value
        elif isinstance(value, dict):
            _accumulate(whole[key], value)
        else:
            for entry in value:
                if entry["index"] < len(whole[key]):
                    _accumulate(whole[key][entry["index"]], entry)
                else:
                    whole[key].append(entry)


def responses_client(case: Case, deltas: list[ChoiceDelta]) -> Told:
    """The items that the events of a response make."""
    builder, output = _responses(case)
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for delta in deltas:
        for event in merge_deltas(output.feed([delta])):
            if event["type"] == "response.output_item.added":
                assert event["output_index"] == len(items) == len(texts)
                items.append({})
                texts.append("")
            elif event["type"].endswith(".delta"):
                texts[event["output_index"]] += event["delta"]
            elif event["type"] == "response.output_item.done":
                items[event["output_index"]] = event["item"]
    assert items == builder.items
    assert texts == [_text_of(item) for item in items]
    return _items(items)


def responses_whole(case: Case, delta: ChoiceDelta) -> Told:
    builder, output = _responses(case)
    output.feed([delta])
    return _items(builder.items)


def _responses(case: Case) -> tuple[OutputBuilder, OutputFormat]:
    builder = OutputBuilder(ItemIdGenerator(f"resp_{'0' * 32}"), frozenset(), False)
    return builder, OutputFormat(call_of(case), None, builder)


def _items(items: list[dict[str, Any]]) -> Told:
    return [(item.get("name", item["type"]), _text_of(item), item["status"]) for item in items]


def _text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item["content"])


def messages_client(case: Case, deltas: list[ChoiceDelta]) -> Told:
    """A stream of Messages, put together as Anthropic's clients do it."""
    formatter = MessageFormat(generation_of(case), None, "all")
    events = [formatter.start(_USAGE)]
    for delta in deltas:
        events += formatter.events(delta)
    return _message(put_together(json.loads(json.dumps([*events, *formatter.end(_USAGE)]))))


def messages_whole(case: Case, delta: ChoiceDelta) -> Told:
    return _message(MessageFormat(generation_of(case), None, "all").response_body(delta, _USAGE))


def _message(message: dict[str, Any]) -> Told:
    told: Told = []
    for block in message["content"]:
        kind = block["type"]
        if kind == "tool_use":
            told.append((block["name"], json.dumps(block["input"])))
        else:
            told.append((kind, block[kind], block.get("signature", "")))
    return [*told, ("end", message["stop_reason"])]


Client = Callable[[Case, list[ChoiceDelta]], Told]
Whole = Callable[[Case, ChoiceDelta], Told]
CLIENTS: tuple[tuple[Client, Whole], ...] = (
    (chat_client, chat_whole),
    (responses_client, responses_whole),
    (messages_client, messages_whole),
)


def cuts(num_tokens: int, seed: int) -> Iterator[list[int]]:
    """All tokens, two pieces at some borders, and pieces of several tokens.

    ``test_answer_fuzz`` cuts at each border; what codecs add to its parsers is costly to repeat.
    """
    yield [1] * num_tokens
    rng = random.Random(seed)
    borders = range(1, num_tokens)
    for place in rng.sample(borders, min(len(borders), BORDERS)):
        yield [place, num_tokens - place]
    places = [0, *sorted(rng.sample(borders, len(borders) // 3)), num_tokens]
    yield [end - start for start, end in pairwise(places)]


def check(case: Case, reason: FinishReason, seed: int) -> None:
    tokens = [*token_pieces(case.text), ""]  # the last one ends it
    (at_once,) = deltas_of(tokens, [len(tokens)], reason)
    wholes = [whole(case, at_once) for _, whole in CLIENTS]
    for cut in cuts(len(tokens), seed):
        deltas = deltas_of(tokens, cut, reason)
        for (client, _), whole in zip(CLIENTS, wholes, strict=True):
            assert client(case, deltas) == whole, (client.__name__, cut, case.text)
    check_protocols(*wholes)


def check_protocols(chat: Told, items: Told, message: Told) -> None:
    """The three tell the same, but for white space between parts."""
    *parts, _ = chat
    texts, calls = parts[:2], parts[2:]
    names = {"reasoning": ("reasoning", "thinking"), "content": ("message", "text")}
    for kind, text in texts:
        item_kind, block_kind = names[kind]
        for told, own in ((items, item_kind), (message, block_kind)):
            found = "".join(one[1] for one in told if one[0] == own)
            assert "".join(found.split()) == "".join(text.split())
    kinds = {"reasoning", "message"}
    assert [one[:2] for one in items if one[0] not in kinds] == calls
    inputs = [one for one in message[:-1] if one[0] not in ("thinking", "text")]
    assert inputs == [(name, json.dumps(_input(text))) for name, text in calls]


def _input(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def run(form: ToolCallFormat | None, count: int) -> None:
    for seed in range(count):
        reason = FinishReason.LENGTH if seed % 3 == 0 else FinishReason.STOP
        check(Writer(form, seed).case(), reason, seed)


@pytest.mark.parametrize("form", FORMS)
def test_streams_equal_whole_answers_in_every_protocol(form: ToolCallFormat | None) -> None:
    run(form, FEW // len(FORMS))


def test_text_behind_a_call_that_waited_for_its_end_comes_after_it() -> None:
    """A value with what looks like a mark is given at the end, in one piece with what follows."""
    case = replace(
        Writer(ToolCallFormat.GLM, 0).case(),
        text="<tool_call>weather\n<arg_key>is_short</arg_key>\n"
        '<arg_value>true</arg"g_key>city</arg_key>\n<arg_value>w</arg_value>\n'
        "</tool_call></arg_value>",
    )
    check(case, FinishReason.STOP, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", FORMS)
def test_streams_equal_whole_answers_in_every_protocol_for_thousands(
    form: ToolCallFormat | None,
) -> None:
    """10,000 answers over all forms."""
    run(form, -(-MANY // len(FORMS)))
