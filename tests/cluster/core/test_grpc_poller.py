"""gRPC's poller outlives the last channel of a process, and its events do not pile up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import grpc

from cluster.core.grpc_poller import keep_grpc_poller

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
NUM_CALLS = 200
NUM_MESSAGES = 3


def test_the_poller_outlives_the_last_channel() -> None:
    subprocess.run([sys.executable, "-c", _SCRIPT], check=True)


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the iterations that handle events of gRPC."""

    num_iterations = 0

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> Any:  # type: ignore[override]
        def count(*args: Any) -> None:
            self.num_iterations += 1
            callback(*args)

        return super().add_reader(fd, count, *args)


async def answer_at_once(is_eager: bool) -> int:
    """Return the iterations for streams that get their messages while the loop is blocked."""
    if is_eager:
        keep_grpc_poller()
    begin, num_open = asyncio.Event(), 0

    async def send(request: bytes, context: Any) -> None:
        nonlocal num_open
        num_open += 1
        await begin.wait()
        for _ in range(NUM_MESSAGES):
            await context.write(b"message")

    server: Any = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(send)
    methods = grpc.method_handlers_generic_handler("test.Test", {"Send": handler})
    server.add_generic_rpc_handlers((methods,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def follow(channel: Any) -> int:
        return len([message async for message in channel.unary_stream("/test.Test/Send")(b"")])

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [asyncio.ensure_future(follow(channel)) for _ in range(NUM_CALLS)]
        while num_open < NUM_CALLS:
            await asyncio.sleep(0.01)
        begin.set()
        loop: Any = asyncio.get_running_loop()
        loop.num_iterations = 0
        await asyncio.sleep(0)
        time.sleep(0.2)
        assert await asyncio.gather(*calls) == [NUM_MESSAGES] * NUM_CALLS
        found: int = loop.num_iterations
    await server.stop(None)
    return found


def test_events_of_a_burst_are_handled_together() -> None:
    """Without the remedy, each takes an iteration of its own."""

    def count(is_eager: bool) -> int:
        with asyncio.Runner(loop_factory=CountingLoop) as runner:
            return runner.run(answer_at_once(is_eager))

    assert count(is_eager=True) < count(is_eager=False) // 2
