"""Retention time of a call's KV blocks, from durations such as ``5m``."""

from __future__ import annotations

import re
from dataclasses import replace

from cluster.config.gateway import GatewaySection
from gateway.core.call import GenerateCall
from gateway.core.field_checks import require

_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_duration_s(duration: str, name: str) -> float:
    """Convert ``5m`` or ``1h`` to seconds. Raises ``RequestError`` with the field ``name``."""
    found = _DURATION.fullmatch(duration)
    rule = f"({duration[:32]!r}) must be a whole number with s, m, h or d, as in 5m"
    require(found is not None, name, rule)
    assert found is not None, "required"
    return int(found[1]) * _SECONDS[found[2]]


def with_ttl_hint(call: GenerateCall, limits: GatewaySection) -> GenerateCall:
    """Set ``cache_ttl`` from the hint if the client has not set it.

    A hint above the server's limit is lowered, as clients can choose only among a few hints. A
    ``cache_ttl`` above the limit is refused.
    """
    hint = call.cache_ttl_hint
    if call.cache_ttl is not None or hint is None:
        return call
    return replace(call, cache_ttl=min(hint, limits.max_cache_ttl_s))
