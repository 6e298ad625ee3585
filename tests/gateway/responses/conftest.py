"""Fixtures of the tests of Responses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.fakes import tiny_tokenizer
from tests.gateway.stack import Stack, running_stack
from tests.gateway.text.tool_formats.test_tools import TEMPLATE


@pytest.fixture(scope="package")
def shared_tools() -> Iterator[Stack]:
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


@pytest.fixture
def tools(shared_tools: Stack) -> Iterator[Stack]:
    """A gateway whose chat template has tools."""
    with shared_tools.as_new():
        yield shared_tools
