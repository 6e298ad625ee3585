"""The models of one gateway replica, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ModelNotFoundError
from cluster.core.process import count_cpus
from cluster.disk.threads import DiskThreads
from gateway.auth.auth import CALLER, KeyRing, make_key_rings
from gateway.calls.output_queue import CallRegistry
from gateway.core.errors import StorageTimeoutError
from gateway.core.tuning import GatewayTuning
from gateway.offload.long_work import LongWork
from gateway.state.store import StateStore, open_store

if TYPE_CHECKING:
    from gateway.calls.gateway import Gateway


class ServedModels:
    """Finds the ``Gateway`` that serves a model name. The first model is the default.

    Hides the models that the key of the current request may not use.
    """

    def __init__(self) -> None:
        self._gateways: dict[str, Gateway] = {}
        self._has_been_ready = False

    def __iter__(self) -> Iterator[Gateway]:
        return iter(self._gateways.values())

    def __len__(self) -> int:
        return len(self._gateways)

    def add(self, gateway: Gateway) -> None:
        self._gateways[gateway.model.name] = gateway

    def find(self, name: str | None) -> Gateway:
        """Return the gateway of a model or adapter; of the first usable model for None.

        Raises ``ModelNotFoundError`` for a name that is unknown, or that the caller may not use.
        """
        for gateway in self:
            if name is None and _may_use(gateway.model.name):
                return gateway
            if name is not None and gateway.model.knows(name) and _may_use(name, gateway):
                return gateway
        if name is None:
            raise ModelNotFoundError("no model that this key may use is served: name one")
        raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")

    def names(self) -> list[tuple[str, Gateway]]:
        """Return the models and adapters that the caller may use, each with its gateway."""
        return [
            (name, gateway)
            for gateway in self
            for name in (gateway.model.name, *gateway.model.adapters.names())
            if _may_use(name, gateway)
        ]

    def not_ready_reasons(self, is_whole: bool = True) -> list[str]:
        """Return reasons why this replica cannot serve requests now; empty if it can.

        A replica becomes ready when all its models are. From then on it stays ready while any model
        is: requests for a lost model fail alone. See ``Readiness.not_ready_reasons``.
        """
        found = {g.model.name: g.readiness.not_ready_reasons(is_whole) for g in self}
        self._has_been_ready = self._has_been_ready or not any(found.values())
        if self._has_been_ready and not all(found.values()):
            return []
        if len(found) == 1:
            return next(iter(found.values()))
        return [f"{name}: {reason}" for name, reasons in found.items() for reason in reasons]


def _may_use(name: str, gateway: Gateway | None = None) -> bool:
    """Whether the current request's key may use a model, or an adapter of ``gateway``'s model."""
    caller = CALLER.get()
    if caller is None or caller.is_admin or not caller.entry.models:
        return True
    return name in caller.entry.models or (
        gateway is not None and gateway.model.name in caller.entry.models
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedParts:
    """What all models of one replica share."""

    keys: KeyRing
    """API keys of the public ports."""
    admin_keys: KeyRing
    """API keys of the admin ports."""
    long_work: LongWork
    state: StateStore | None
    """Store of clients' objects, such as responses; None if the state folder is disabled."""
    disk: DiskThreads
    """Threads that access the store ``state`` on disk for requests."""
    running: CallRegistry
    """Running calls of the replica."""
    models: ServedModels = field(default_factory=ServedModels)

    @classmethod
    def of(
        cls, section: GatewaySection, tuning: GatewayTuning, state: StateStore | None = None
    ) -> SharedParts:
        """Make the parts; without ``state``, open the configured store on the calling thread."""
        keys, admin_keys = make_key_rings(section)
        return cls(
            keys=keys,
            admin_keys=admin_keys,
            long_work=LongWork(),
            state=open_store(section) if state is None else state,
            disk=DiskThreads(
                "the state folder",
                tuning.disk_threads,
                tuning.disk_max_waiting,
                tuning.disk_limit_s,
                StorageTimeoutError,
            ),
            running=CallRegistry(count_cpus()),
        )
