"""Passes the stages of solo steps (``SoloStage``) to gateways, and acknowledgements back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from workers.engine.engine import Engine
from workers.requests.request import Queued, SoloStep


@dataclass(slots=True)
class SoloStepReporter:
    """Sends ``SoloStage`` messages to a gateway, and its acknowledgements to the engine.

    Call the methods on the engine's thread only.
    """

    engine: Engine
    publish: Callable[[str, SoloStep | Queued], None]
    """Sends a message to a gateway, by its name."""
    _gateway: str = ""
    """Gateway of the last solo step, kept even if its request has ended."""

    def report(self, owners: Mapping[str, str]) -> None:
        """Send the engine's new messages to gateways. ``owners``: gateway by request id."""
        for message in self.engine.requests.take_solo_steps():
            self._gateway = owners.get(message.request_id, self._gateway)
            self.publish(self._gateway, message)

    def acknowledge(self, gateway: str, solo_step: SoloStep) -> None:
        """Pass a gateway's acknowledgement of a stage to the engine."""
        if gateway == self._gateway:
            self.engine.requests.isolation.acknowledge(solo_step)

    def drop_gateway(self, gateway: str) -> None:
        """End a solo step of a lost gateway: the engine no longer waits for acknowledgements."""
        if gateway == self._gateway:
            self.engine.requests.isolation.drop_solo_step()
