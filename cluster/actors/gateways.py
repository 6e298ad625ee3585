"""What gateways say to the controller: which of them follow it, and what each reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from cluster.controller.controller import Controller
from cluster.controller.parts.gateway_polls import GatewayPolls
from cluster.core.frames import LowDisk
from cluster.tracing.gateway_counts import GatewayCounts


class Gateways:
    """Decides which gateways still follow the controller. Event loop of the actor only."""

    def __init__(
        self, controller: Callable[[], Controller | None], notify: Callable[[], None]
    ) -> None:
        """``controller`` returns the present one, gateways may ask before there is one; ``notify``
        wakes calls that wait for a change.
        """
        self._controller = controller
        self._notify = notify
        self._polls = GatewayPolls()
        self.counts = GatewayCounts()

    def asks(
        self,
        gateway: str,
        known_version: int,
        host: str,
        low_disks: tuple[LowDisk, ...],
        adapters: Collection[str],
    ) -> None:
        """A gateway that knows this snapshot asks for the next one.

        ``low_disks`` are the disks of its ``host`` that are nearly full, ``adapters`` the keys of
        those that its requests have.
        """
        is_back = self._polls.begin(gateway)
        if (controller := self._controller()) is None:
            return
        if is_back:
            controller.cluster.note(f"{gateway} is back", "it serves again", time.monotonic())
        controller.cluster.host_has(low_disks, host, gateway)
        controller.adapters.uses.report(gateway, known_version, adapters)
        self._notify()

    def answered(self, gateway: str) -> None:
        """Its question is answered; it asks again soon if it lives."""
        self._polls.end(gateway, time.monotonic())

    def leaves(self, gateway: str) -> None:
        """A gateway ends in order."""
        if self._polls.leave(gateway):
            self._left(gateway, f"{gateway} has left", "its requests have ended")

    def drop_silent(self) -> None:
        """Forget gateways that have stopped asking."""
        for gateway in self._polls.take_gone(time.monotonic()):
            self._left(gateway, f"{gateway} is gone: it no longer asks", "its requests end")

    def _left(self, gateway: str, cause: str, effect: str) -> None:
        if (controller := self._controller()) is not None:
            controller.cluster.host_has((), "", gateway)
            controller.adapters.uses.leave(gateway)
            controller.cluster.note(cause, effect, time.monotonic())
            self._notify()
