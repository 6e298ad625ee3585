"""The wait for a gateway; with TLS see ``tests/gateway/auth/test_tls.py``."""

from __future__ import annotations

import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import StartError
from cluster.launch.readiness import wait_ready
from tests.cluster.cli.fake_gateway import fake_gateway

PLAIN = GatewaySection()


def never() -> list[str]:
    raise AssertionError("without a CA for clients its port itself is asked")


def test_it_ends_when_the_gateway_is_ready() -> None:
    with fake_gateway() as gateway:
        wait_ready(gateway.url, PLAIN, never)


def test_it_gives_up_with_the_gateway_s_own_reasons() -> None:
    with fake_gateway() as gateway:
        gateway.ready = (503, {"ready": False, "reasons": ["loading"]})
        with pytest.raises(StartError, match="loading"):
            wait_ready(gateway.url, PLAIN, never, limit_s=0.0)
        url = gateway.url
    with pytest.raises(StartError, match="refused"):
        wait_ready(url, PLAIN, never, limit_s=0.0)
