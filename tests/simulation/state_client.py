"""A client that stores, reads and deletes objects at gateways, and believes what it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from gateway.core.errors import StorageError
from gateway.state.store import ObjectKind, StateStore

if TYPE_CHECKING:
    from tests.simulation.gateways import SimGateway

_KIND = ObjectKind("responses", "resp")
_TENANT = "tenant"
_SIZES = (1, 200, 5000)
"""Bytes of an object."""


class Belief(Enum):
    """What the client knows of an object."""

    OPEN = "a call for it has not ended, or failed: it may be there"
    STORED = "it is there"
    DELETED = "it is not"


@dataclass(slots=True)
class _Object:
    content: bytes
    belief: Belief = Belief.OPEN
    is_busy: bool = False
    """A call for it has not ended."""


class StateClient:
    """See the module.

    Args:
        seed: of its choices.
        failures: takes what is wrong.
        may_fail: whether the disk does, or has a moment ago.
    """

    def __init__(self, seed: int, failures: list[str], may_fail: Callable[[], bool]) -> None:
        self._rng = random.Random(f"state {seed}")
        self._failures = failures
        self._may_fail = may_fail
        self._objects: dict[str, _Object] = {}
        self.num_stored = self.num_read = 0

    def act(self, gateway: SimGateway) -> None:
        """Store a new object, or read or delete one that no call is under way for."""
        idle = [name for name, one in self._objects.items() if not one.is_busy]
        choice = self._rng.random()
        if choice < 0.4 or not idle:
            content = self._rng.randbytes(self._rng.choice(_SIZES))
            self._begin(gateway, self._store(gateway, content))
            return
        name = self._rng.choice(idle)
        call = self._read if choice < 0.9 else self._delete
        self._objects[name].is_busy = True  # now: a paused gateway begins the call later
        self._begin(gateway, call(gateway, name))

    def read_all(self, gateway: SimGateway) -> None:
        """Read every object, also those whose calls were lost with their gateways."""
        for name, one in self._objects.items():
            one.is_busy = True
            self._begin(gateway, self._read(gateway, name))

    def _begin(self, gateway: SimGateway, work: Any) -> None:
        loop = gateway.process.loop
        gateway.process.run(loop.call_soon, lambda: loop.create_task(work))

    async def _store(self, gateway: SimGateway, content: bytes) -> None:
        store = _store_of(gateway)
        name = store.new_id(_KIND)
        one = self._objects[name] = _Object(content, is_busy=True)
        try:
            await asyncio.to_thread(store.put, _KIND, _TENANT, name, content)
            one.belief = Belief.STORED
            self.num_stored += 1
        except StorageError as err:
            self._check_error(name, err)
        one.is_busy = False

    async def _delete(self, gateway: SimGateway, name: str) -> None:
        one = self._objects[name]
        before, one.belief = one.belief, Belief.OPEN
        try:
            was_there = await asyncio.to_thread(_store_of(gateway).delete, _KIND, _TENANT, name)
            one.belief = Belief.DELETED
            if not was_there and before is Belief.STORED:
                self._failures.append(f"{name} was stored, and is not there to be deleted")
        except StorageError as err:
            self._check_error(name, err)
        one.is_busy = False

    async def _read(self, gateway: SimGateway, name: str) -> None:
        one = self._objects[name]
        try:
            found = await asyncio.to_thread(_store_of(gateway).get, _KIND, _TENANT, name)
            self.num_read += found is not None
            if found is not None and found.content != one.content:
                self._failures.append(f"{name} has other contents")
            elif found is None and one.belief is Belief.STORED:
                self._failures.append(f"{name} was stored, and is gone")
            elif found is not None and one.belief is Belief.DELETED:
                self._failures.append(f"{name} was deleted, and is there")
        except StorageError as err:
            self._check_error(name, err)
        one.is_busy = False

    def _check_error(self, name: str, err: StorageError) -> None:
        if "damaged" in str(err):
            self._failures.append(f"{name}: {err}")
        elif not self._may_fail():
            self._failures.append(f"{name}: {err}, though the disk is well")


def _store_of(gateway: SimGateway) -> StateStore:
    store = gateway._gateway.state
    assert store is not None, "it has a folder"
    return store
