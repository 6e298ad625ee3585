"""Meeting of the workers of a generation, which connect their process groups through a store."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final, NoReturn

import torch

from cluster.core.addresses import split_address
from cluster.core.errors import first_line
from cluster.core.topology import Generation, runs_attention
from workers.model.torch_private import Store, TCPStore
from workers.transport.gloo_world import GlooWorld
from workers.transport.nccl_world import NcclWorld
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import Direction
from workers.transport.world import (
    BOTH_WAYS,
    ONE_WAY,
    Backend,
    World,
    WorldSetup,
    listen_store,
)

_WORLDS: Final[Mapping[Backend, type[World]]] = {"gloo": GlooWorld, "nccl": NcclWorld}


class Rendezvous:
    """Creates and connects the worlds of one worker. An attention worker hosts a store."""

    def __init__(
        self,
        connections: PeerConnections,
        *,
        backend: Backend,
        device: torch.device,
        host: str,
        store_port: int,
        connect_timeout_s: float,
    ) -> None:
        """On an attention worker, open a rendezvous store on ``host``; port 0 is a free port."""
        self._connections = connections
        self._backend: Backend = backend
        self._device = device
        self._host = host
        self._connect_timeout_s = connect_timeout_s
        self._store = (
            listen_store(host, store_port, connect_timeout_s)
            if runs_attention(connections.me.role)
            else None
        )

    @property
    def store_address(self) -> str:
        """``host:port`` of this worker's rendezvous store; empty on an expert worker."""
        return f"{self._host}:{self._store.port}" if self._store is not None else ""

    def new_world(self, generation: int, names: Sequence[str], peers: Sequence[int]) -> World:
        """Return a world that is not connected yet.

        ``names``: names of all members in order of world rank. ``peers``: world ranks of the peers.
        """
        role = self._connections.me.role
        sends: tuple[Direction, ...] = ("rows",) if runs_attention(role) else ("outputs",)
        receives: tuple[Direction, ...] = ("outputs",) if runs_attention(role) else ("rows",)
        if role == "colocated":
            sends = receives = ("rows", "outputs")
        setup = WorldSetup(
            prefix=f"generation-{generation}",
            rank=names.index(self._connections.me.name),
            size=len(names),
            peers=tuple(peers),
            channels=BOTH_WAYS if role == "colocated" else ONE_WAY,
            sends=sends,
            receives=receives,
            host=self._host,
            device=self._device,
            connect_timeout_s=self._connect_timeout_s,
            step_timeout_s=self._connections.step_timeout_s,
        )
        return _WORLDS[self._backend](setup)

    def connect(self, world: World, address: str, blamed: Sequence[str]) -> None:
        """Connect the process groups on another thread, so that an interrupt can end the wait.

        ``address``: the store of the generation. Raises ``PeerLostError``, for the workers in
        ``blamed`` if no cause is known, and ``GenerationChangedError``.
        """
        failures: list[Exception] = []
        finished = threading.Event()

        def build() -> None:
            try:
                world.connect(self._open_store(address))
            except Exception as err:  # the data thread handles or raises it
                failures.append(err)
            finally:
                finished.set()

        threading.Thread(target=build, daemon=True, name="world-build").start()
        while not finished.wait(0.02):
            self._connections.poll()
        for err in failures:
            if not isinstance(err, RuntimeError | ValueError):  # torch's: DistError and others
                raise err
            reason = f"no process group {world.setup.prefix}: {first_line(err)}"
            self._await_cause(reason, blamed)

    def _await_cause(self, reason: str, blamed: Sequence[str]) -> NoReturn:
        """Wait until the edges or the controller report which member was lost, and raise the error.

        After a timeout, raises ``PeerLostError`` for ``blamed``. ``reason``: observed error.
        """
        self._connections.wait(
            lambda: False,
            lambda: list(blamed),
            timeout_s=self._connect_timeout_s,
            what=reason + ": no cause",
        )
        raise AssertionError("the wait has ended by raising")

    def _open_store(self, address: str) -> Store:
        if self._store is not None and address == self.store_address:
            return self._store
        host, port = split_address(address)
        return TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=self._connect_timeout_s)
        )


def world_names(generation: Generation) -> list[str]:
    """Return the names of all members in order of world rank, attention workers first."""
    names = [m.name for m in generation.attention]
    return names + [m.name for m in generation.experts if m.name not in names]
