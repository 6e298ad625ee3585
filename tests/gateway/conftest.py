"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.auth.auth import CALLER
from tests.gateway.fakes import other_tokenizer
from tests.gateway.stack import OTHER_MODEL, Stack, running_stack


@pytest.fixture(autouse=True)
def _own_caller() -> Iterator[None]:
    """A key that enters outside a request's task is nobody in the tests that follow."""
    token = CALLER.set(None)
    yield
    CALLER.reset(token)


@pytest.fixture(scope="package")
def shared_stack() -> Iterator[Stack]:
    """One gateway for all tests of this folder that leave it as it was."""
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The shared gateway, with its engine's defaults before and nothing running after the test."""
    with shared_stack.as_new():
        yield shared_stack


@pytest.fixture(scope="package")
def shared_pair() -> Iterator[Stack]:
    """One gateway with two models for all tests of this folder that leave it as it was."""
    with running_stack(more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        yield stack


@pytest.fixture
def pair(shared_pair: Stack) -> Iterator[Stack]:
    """The shared gateway with two models, as ``stack`` is that with one."""
    with shared_pair.as_new():
        yield shared_pair
