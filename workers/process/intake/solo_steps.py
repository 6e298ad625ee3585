"""Reports the stages of solo steps between the engine and the gateway of the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from workers.engine.engine import Engine
from workers.requests.request import Queued, SoloStep


@dataclass(slots=True)
class SoloStepReporter:
    """Sends stages to the gateway, and passes its acknowledgements to the engine.

    All methods are for the engine's thread.
    """

    engine: Engine
    publish: Callable[[str, SoloStep | Queued], None]
    """Sends a message to a gateway, by its name."""
    _gateway: str = ""
    """Gateway of the last solo step; its request may have ended."""

    def report(self, owners: Mapping[str, str]) -> None:
        """Send the engine's new stages. ``owners``: gateways by request."""
        for message in self.engine.requests.take_solo_steps():
            self._gateway = owners.get(message.request_id, self._gateway)
            self.publish(self._gateway, message)

    def acknowledge(self, gateway: str, solo_step: SoloStep) -> None:
        """Pass on the acknowledgement of a stage."""
        if gateway == self._gateway:
            self.engine.requests.isolation.acknowledge(solo_step)

    def drop_gateway(self, gateway: str) -> None:
        """Handle a lost gateway: other requests run without its acknowledgement."""
        if gateway == self._gateway:
            self.engine.requests.isolation.drop_solo_step()
