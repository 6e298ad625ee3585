"""Who uses a cluster: clients with requests and conversations, one with stored objects, and an
operator of adapters. They go to the gateways that live.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.core.states import ClusterState
from tests.simulation.asks import Ask, next_turn
from tests.simulation.configuration import BLOCK_TOKENS
from tests.simulation.outcomes import Outcome
from tests.simulation.scenario import draw_more
from tests.simulation.state_client import StateClient
from tests.simulation.toy_adapters import ADAPTERS

if TYPE_CHECKING:
    from tests.simulation.gateways import SimGateway
    from tests.simulation.world import World

_AGAIN_S = 0.2
"""Time after which a client asks again whose gateway has died."""
_STATE_S = 0.1
"""Time between two calls of the client of stored objects."""
_RELOAD_S = 1.0
"""Time between two looks of the operator for adapters that are not loaded."""


class Clients:
    """See the module."""

    def __init__(self, world: World) -> None:
        self._world, self._kernel = world, world.kernel
        self.outcomes: list[Outcome] = []
        """Of all requests."""
        self.state = StateClient(
            world.scenario.seed, world.kernel.failures, lambda: world.faults.state_may_fail
        )
        self._more: Iterator[Ask] = draw_more(world.scenario)

    def begin(self) -> None:
        """Send the scenario's requests at their times, and use its features."""
        for ask in self._world.scenario.asks:
            self._send(ask)
        if self._world.state is not None:
            self._use_state()
        if "adapters" in self._world.scenario.features:
            self._load_adapters()

    def ask_on(self) -> None:
        """One more request."""
        self._send(next(self._more))

    def go_on(self, outcome: Outcome) -> None:
        """A client that has its answer takes the next turn of its conversation."""
        if outcome.is_right:
            room = BLOCK_TOKENS * self._world.scenario.num_kv_blocks
            ask = next_turn(outcome.ask, outcome.choices[0].received, room)
            if ask is not None:
                self._send(ask)

    def ask_others(self, gateway: SimGateway) -> None:
        """Clients of a gateway that has died ask again if they have no answer."""
        for outcome in gateway.outcomes:
            if not outcome.is_over:
                at_s = max(outcome.begins_at - self._kernel.now, _AGAIN_S)
                self._send(replace(outcome.ask, name=f"{outcome.ask.name}~", at_s=at_s))

    def read_all(self) -> None:
        """Read all stored objects."""
        if self._world.state is not None:
            self.state.read_all(self._world.living_gateways()[0])

    def _send(self, ask: Ask) -> None:
        living = self._world.living_gateways()
        if living:
            self.outcomes.append(living[ask.gateway % len(living)].ask(ask))
        else:
            self._kernel.after(_AGAIN_S, self._send, ask)

    def _use_state(self) -> None:
        """Store, read and delete objects until all is healed."""
        if not self._world.faults.is_healed:
            self._kernel.after(_STATE_S, self._use_state)
            if living := self._world.living_gateways():
                self.state.act(self._kernel.rng.choice(living))

    def _load_adapters(self) -> None:
        """An operator loads those that are not loaded any more."""
        self._kernel.after(_RELOAD_S, self._load_adapters)
        controller = self._world.ray.controller
        found = controller.actor.runner.controller if controller is not None else None
        if found is not None and found.cluster.state is ClusterState.SERVING:
            entries = found.cluster.adapters.to_list()
            known = [a["name"] for a in entries if a["state"] != "UNLOADING"]
            for name in sorted(ADAPTERS.keys() - {*known}):
                self._world.faults.command("load_adapter", {"name": name, "path": ADAPTERS[name]})
