"""gRPC's poller outlives the last channel of a process."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import asyncio, gc, threading
import grpc.aio
from cluster.core.grpc_poller import keep_grpc_poller

async def open_and_close():
    keep_grpc_poller()
    async with grpc.aio.insecure_channel("127.0.0.1:1"):
        pass

asyncio.run(open_and_close())
gc.collect()
assert any("_poll_wrapper" in thread.name for thread in threading.enumerate())
"""


def test_the_poller_outlives_the_last_channel() -> None:
    subprocess.run([sys.executable, "-c", _SCRIPT], check=True)
