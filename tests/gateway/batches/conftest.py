"""Gateways with a state folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config.gateway import GatewaySection
from tests.gateway.stack import WAIT_S, Stack, running_stack

KEYS = ("first-key-first-key", "other-key-other-key")


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Stack]:
    """A gateway with a state folder."""
    section = GatewaySection(request_timeout_s=WAIT_S, state_dir=str(tmp_path / "state"))
    with running_stack(section) as stack:
        yield stack


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Stack]:
    """The same with keys."""
    section = GatewaySection(
        request_timeout_s=WAIT_S, state_dir=str(tmp_path / "state"), api_keys=KEYS
    )
    with running_stack(section) as stack:
        yield stack
