"""Work of a controller and of a gateway's page in large clusters, for ``benchmarks.engine.scale``.

All of it is for a model with 61 layers of 384 experts. The functions return microseconds of CPU
time.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from benchmarks.harness.large_cluster import LargeCluster
from cluster.cli.cluster.info import _status_text
from cluster.controller.documents import load_document, placement_document
from gateway.auth.auth import KeyRing
from gateway.calls.gateway import Gateway
from gateway.dashboard.data import PageData
from gateway.observability.samples import TOTALS

_RUNS = 5


def control_us(num_members: int) -> dict[str, float]:
    """Return the CPU time of a controller and a page, by kind of work.

    ``start``: the controller's work until all workers serve, with the states that it sends to one
    caller that follows every change. ``beats``: a heartbeat of each worker. ``load``: the documents
    about load and placement after a new report. ``status``: the state as text on a terminal.
    ``page``: the state for an open page, which the gateway makes each second.
    """
    began = time.thread_time_ns()
    large = LargeCluster(num_members)
    made = time.thread_time_ns() - began
    large.start()
    start_us = (time.thread_time_ns() - began - made) / 1e3
    beats = large.heartbeats()
    beats_us = _least_us(lambda: large.beat(beats))
    status = pickle.dumps(large.controller.snapshot())
    newest = {"attention-0": beats["attention-0"]}

    def documents() -> None:
        large.beat(newest)
        load_document(large.cluster)
        placement_document(large.cluster)

    return {
        "start": start_us,
        "beats": beats_us,
        "load": _least_us(documents),
        "status": _least_us(lambda: _status_text(large.controller.snapshot(), colours=False)),
        "page": _least_us(lambda: page_of(status)),
    }


def page_of(received: bytes) -> bytes:
    """Return the JSON that a page gets; ``received``: the state as Ray delivers it."""

    async def answer() -> bytes:
        state = await PageData(_Gateway.of(pickle.loads(received)), KeyRing()).state()
        return json.dumps(state, separators=(",", ":"), allow_nan=False).encode()

    return asyncio.run(answer())


class _Gateway:
    """The parts of a gateway that the data of the page uses."""

    @staticmethod
    def of(snapshot: dict[str, Any]) -> Gateway:
        async def get() -> dict[str, Any]:
            return snapshot

        async def call(what: str) -> dict[str, Any]:
            summary = {"describe": {}, "totals": dict.fromkeys(TOTALS, 1.0), "created": 1}
            return {"gateway-0": summary}

        replicas = SimpleNamespace(call=call)
        model = SimpleNamespace(numbers=SimpleNamespace(snapshot=get))
        made = SimpleNamespace(
            shared=SimpleNamespace(models=SimpleNamespace(default=model)),
            status=SimpleNamespace(replicas=replicas, combine=lambda status, *_: status),
            counts=SimpleNamespace(ended=lambda replicas: {}),
            limits=SimpleNamespace(has_tls=False),
        )
        return cast(Gateway, made)


def _least_us(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(_RUNS):
        began = time.thread_time_ns()
        work()
        taken.append(time.thread_time_ns() - began)
    return min(taken) / 1e3
