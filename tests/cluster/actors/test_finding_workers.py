"""Which workers of an earlier controller a group finds: handles without Ray."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.actors import ray_tools, worker_group
from cluster.actors.resource_reservation import ResourceReservation
from cluster.actors.worker_group import WorkerGroup
from cluster.core.process import ProcessIdentity
from tests.cluster.controller.fakes_cluster import CONFIG

FACTS = {"config": CONFIG.to_dict(), "num_slots": 3, "has_called": True}
LOST = ActorUnavailableError("the connection broke", None)
DEAD = ActorDiedError()
LIMIT_S = 0.2


class Handle:
    """A handle whose calls end with these errors, then with an answer."""

    def __init__(self, errors: Sequence[Exception]) -> None:
        self._errors = deque(errors)

    @property
    def __ray_call__(self) -> Any:
        return self

    async def remote(self, function: object) -> tuple[dict[str, Any], ProcessIdentity, str]:
        if self._errors:
            raise self._errors.popleft()
        return FACTS, ProcessIdentity(pid=7, started_at=0.0), "node"


@pytest.mark.parametrize(
    ("errors", "found", "known"),
    [
        ([], ["expert-0", "expert-1"], ["expert-0", "expert-1"]),
        ([LOST, LOST], ["expert-0", "expert-1"], ["expert-0", "expert-1"]),
        ([LOST] * 1000, ["expert-1"], ["expert-0", "expert-1"]),
        ([LOST, DEAD], ["expert-1"], ["expert-1"]),
    ],
    ids=["answers", "calls are lost", "all calls are lost", "has died"],
)
def test_a_worker_is_left_out_when_it_has_died_or_does_not_answer_in_time(
    monkeypatch: pytest.MonkeyPatch, errors: list[Exception], found: list[str], known: list[str]
) -> None:
    handles = {"expert-0": Handle(errors), "expert-1": Handle([])}
    monkeypatch.setattr(ray_tools, "live_actor_names", lambda namespace: [*handles, "gateway"])
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: handles[name])
    monkeypatch.setattr(worker_group, "_POLL_S", 0.01)
    monkeypatch.setattr(ResourceReservation, "find", lambda room: None)
    group = WorkerGroup({"expert": object})
    assert [f.name for f in asyncio.run(group.find(LIMIT_S))] == found
    assert group.names() == known
