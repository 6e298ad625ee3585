"""The middlewares of Serve's proxy, in a process of their own: some change uvicorn for good."""

from __future__ import annotations

import json
import subprocess
import sys

_CALL = """
import json, threading, uvicorn
from gateway.serve_proxy.middlewares import proxy_middlewares

guards = [middleware.cls.__name__ for middleware in proxy_middlewares()]
config = uvicorn.config
print(json.dumps([
    guards,
    hasattr(config.create_ssl_context, "__wrapped__"),
    config.HTTP_PROTOCOLS["auto"],
    [thread.name for thread in threading.enumerate()],
]))
"""


def test_the_proxy_has_every_guard_and_patch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CALL], check=True, timeout=60, capture_output=True
    )
    guards, demands_certificates, protocol, threads = json.loads(done.stdout)
    assert guards == [
        *("UnservedGuard", "RefusalEcho", "ExpectContinueGuard", "RequestIdGuard"),
        "ReceiptSender",
    ]
    assert demands_certificates
    assert protocol == "gateway.serve_proxy.bounded_protocol:BoundedHttpProtocol"
    assert "freed-memory" in threads
