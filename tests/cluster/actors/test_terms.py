"""Terms that controllers claim in Ray's tables."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cluster.actors import ray_tools, worker_actor
from cluster.actors.worker_group import WorkerGroup
from cluster.core.errors import SupersededError


class Tables:
    """Ray's tables, whose head may not answer for a while."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.answers = threading.Event()
        self.num_waiting = threading.Semaphore(0)

    def put(self, key: str, value: str, overwrite: bool, namespace: str) -> bool:
        self.num_waiting.release()
        self.answers.wait()
        is_there = key in self.values
        self.values.setdefault(key, value.encode())
        return is_there

    def get(self, key: str, namespace: str) -> bytes | None:
        return self.values.get(key)

    def keys(self, prefix: str, namespace: str) -> list[bytes]:
        return [key.encode() for key in self.values if key.startswith(prefix)]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    made = Tables()
    for name in ("put", "get"):
        monkeypatch.setattr(ray_tools, f"_internal_kv_{name}", getattr(made, name))
    monkeypatch.setattr(ray_tools, "_internal_kv_list", made.keys)
    return made


def test_each_controller_claims_a_term_above_the_others(tables: Tables) -> None:
    tables.answers.set()
    assert [ray_tools.claim_term(name) for name in "abb"] == [1, 2, 3]
    assert ray_tools.newest_term() == 3
    assert ray_tools.newest_term(1, "a") == 3
    assert ray_tools.newest_term(2, "b") == 0
    assert ray_tools.newest_term(3, "a") == 0
    assert ray_tools.newest_term(0, "b") == 1


def test_a_claim_that_comes_through_late_does_not_overtake_its_own_controller(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's head did not answer in time, and the controller has claimed again."""
    monkeypatch.setattr(worker_actor, "CALL_LIMIT_S", 0.01)

    async def body() -> None:
        group = WorkerGroup({})
        with pytest.raises(TimeoutError):
            await group.claim("a controller")
        await asyncio.to_thread(tables.num_waiting.acquire)
        monkeypatch.setattr(worker_actor, "CALL_LIMIT_S", 60.0)
        tables.values["term-1"] = b"a controller"  # the second claim, which came through first
        group._term, group._identity = 1, "a controller"
        tables.answers.set()
        while "term-2" not in tables.values:  # the first one
            await asyncio.sleep(0)
        await group.check_term()
        tables.values["term-3"] = b"another one"
        with pytest.raises(SupersededError, match="term 3 is claimed, this controller has 1"):
            await group.check_term()

    asyncio.run(body())
