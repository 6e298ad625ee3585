"""A gateway with clients in a process that will be killed; started by ``reliability``.

python -m benchmarks.faults.second_gateway

Stdin has one line, the configuration and a snapshot of the cluster as JSON. ``flowing`` on stdout
says that every client gets tokens; then it goes on until it is killed or stdin is closed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from benchmarks.harness.engine_stream import TOKEN
from benchmarks.harness.mixed_calls import make_calls
from cluster.config.cluster import ClusterConfig
from gateway.calls.gateway import Gateway
from gateway.cluster.view import ControllerCall, SnapshotFollower
from gateway.engines.engine_pool import EnginePool
from gateway.text.tokenizer import load_tokenizer

NUM_STREAMS = 8
NUM_TOKENS = 200
_NUM_DELTAS = 3


class Standstill:
    """A controller whose snapshot never changes."""

    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    async def call(self, call: ControllerCall, *details: Any) -> dict[str, Any]:
        """See ``gateway.cluster.view.ControllerCalls``."""
        if call == "wait_snapshot" and details[0] == self._snapshot["version"]:
            await asyncio.sleep(details[1])
        return self._snapshot


async def serve(config: ClusterConfig, snapshot: dict[str, Any]) -> None:
    """Clients that send calls until the process is killed."""
    controller = Standstill(snapshot)

    async def find() -> Standstill:
        return controller

    view = SnapshotFollower(find)
    tokenizer = load_tokenizer(config.model.path)
    gateway = Gateway(config, tokenizer, view, EnginePool(TOKEN, "second"), "second")
    view.start()
    while gateway.readiness.not_ready_reasons() or not gateway.model.facts:
        await asyncio.sleep(0.01)
    waiting = set(range(NUM_STREAMS))

    async def ask(number: int) -> None:
        call = make_calls(NUM_STREAMS, NUM_TOKENS)[number]
        num_deltas = 0
        for repeat in range(1_000_000):
            with await gateway.start(call, f"second-{number}-{repeat}") as generation:
                while not generation.is_finished:
                    num_deltas += bool(await generation.next())
                    if num_deltas == _NUM_DELTAS and number in waiting:
                        waiting.discard(number)
                        if not waiting:
                            sys.stdout.write("flowing\n")
                            sys.stdout.flush()

    end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    clients = asyncio.gather(*map(ask, range(NUM_STREAMS)))
    await asyncio.wait({asyncio.ensure_future(clients), end}, return_when="FIRST_COMPLETED")


def main() -> None:
    """See the module."""
    given = json.loads(sys.stdin.readline())
    asyncio.run(serve(ClusterConfig.from_dict(given["config"]), given["snapshot"]))


if __name__ == "__main__":
    main()
