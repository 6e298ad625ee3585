"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.fakes import counting_script
from tests.gateway.stack import Stack, running_stack


@pytest.fixture(scope="package")
def shared_stack() -> Iterator[Stack]:
    """One gateway for all tests of this folder that leave it as it was."""
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The shared gateway, with its engine's defaults before and nothing running after the test."""
    engine = shared_stack.engine
    engine.script, engine.step_s, engine.tokens_per_output = counting_script, 0.0, 1
    engine.is_paused, engine.error, engine.repeat_outputs = False, None, False
    engine.num_cached_tokens = 0
    engine.requests.clear()
    engine.aborts.clear()
    shared_stack.controller.drain_orders.clear()
    yield shared_stack
    engine.is_paused = False
    shared_stack.wait_for(lambda: not engine.running, "the end of all requests")
