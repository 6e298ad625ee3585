"""Handles the polls of gateways (calls of ``ControllerActor.wait_snapshot``) and their reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from cluster.controller.controller import Controller
from cluster.controller.gateway_polls import GatewayPolls
from cluster.core.frames import LowDisk
from cluster.tracing.gateway_counts import GatewayCounts


class Gateways:
    """Tracks the gateways that poll the controller.

    For the event loop of the controller actor only.
    """

    def __init__(
        self, controller: Callable[[], Controller | None], notify: Callable[[], None]
    ) -> None:
        """``controller`` returns the current controller, or None before it exists.

        ``notify`` wakes calls that wait for a change of the cluster's state.
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
        """Handle the start of a gateway's poll.

        ``known_version``: version of the gateway's snapshot. ``low_disks``: folders on nearly full
        disks of the gateway's ``host``. ``adapters``: keys of the LoRA adapters that its requests
        use.
        """
        is_back = self._polls.begin(gateway)
        if (controller := self._controller()) is None:
            return
        if is_back:
            controller.cluster.note(f"{gateway} is back", "it serves again", time.monotonic())
        controller.cluster.update_low_disks(low_disks, host, gateway)
        controller.adapters.uses.report(gateway, known_version, adapters)
        self._notify()

    def answered(self, gateway: str) -> None:
        """Record the end of a gateway's poll. A live gateway soon polls again."""
        self._polls.end(gateway, time.monotonic())

    def leaves(self, gateway: str) -> None:
        """Handle the shutdown of a gateway."""
        if self._polls.leave(gateway):
            self._left(gateway, f"{gateway} has left", "its requests have ended")

    def drop_silent(self) -> None:
        """Remove gateways that no longer poll."""
        for gateway in self._polls.take_gone(time.monotonic()):
            self._left(gateway, f"{gateway} is gone: it no longer asks", "its requests end")

    def _left(self, gateway: str, cause: str, effect: str) -> None:
        if (controller := self._controller()) is not None:
            controller.cluster.update_low_disks((), "", gateway)
            controller.adapters.uses.leave(gateway)
            controller.cluster.note(cause, effect, time.monotonic())
            self._notify()
