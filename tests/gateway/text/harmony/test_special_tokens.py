"""Headers of messages, and the message that a prompt leaves open."""

from __future__ import annotations

import pytest

from gateway.text.harmony.special_tokens import (
    OPENED,
    SPECIAL_TOKENS,
    MessageHeader,
    open_header,
    open_message,
    read_header,
)
from tests.gateway.fakes import tiny_backend


@pytest.mark.parametrize(
    ("text", "channel", "recipient", "is_content"),
    [
        ("assistant<|channel|>final", "final", "", True),
        ("<|channel|>analysis", "analysis", "", False),
        ("assistant to=functions.f<|channel|>commentary json", "commentary", "functions.f", False),
        ("<|channel|>commentary to=f<|constrain|>json", "commentary", "f", False),
        ("assistant", "", "", True),
    ],
)
def test_headers_have_channel_and_recipient_in_any_order(
    text: str, channel: str, recipient: str, is_content: bool
) -> None:
    header = read_header(text)
    assert header == MessageHeader(channel, recipient)
    assert header.is_content is is_content


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", OPENED),
        ("<|start|>user<|message|>Hi<|end|>", ""),
        ("<|start|>assistant<|message|>{}<|call|>", ""),
        (
            "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>So",
            "<|start|>assistant<|channel|>final<|message|>",
        ),
        ("<|start|>assistant<|channel|>", "<|start|>assistant<|channel|>"),
        ("Hi", ""),
        ("", ""),
    ],
)
def test_the_open_message_is_the_last_one_without_an_end(prompt: str, opened: str) -> None:
    assert open_message(prompt) == opened
    backend = tiny_backend()
    backend.add_special_tokens([*SPECIAL_TOKENS])
    ids = backend.encode(prompt).ids
    found = open_header(ids, backend.get_vocab())
    assert backend.decode(list(found), skip_special_tokens=False) == opened
