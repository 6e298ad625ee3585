"""Random faults in random order, and what must be so at every moment and in the end."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cluster.controller.drain_operation import DrainCommand
from cluster.core.errors import ConflictError
from cluster.core.frames import PeerLost
from tests.cluster.controller.controller_world import World

NUMBERS = st.integers(0, 9)


class ControllerMachine(RuleBasedStateMachine):
    """Workers die, freeze, wake up, blame each other; the controller dies and comes back."""

    @initialize(
        num_attention=st.integers(1, 3), num_experts=st.integers(1, 4), spare=st.integers(0, 12)
    )
    def start(self, num_attention: int, num_experts: int, spare: int) -> None:
        most = 8 * num_experts - 8  # of 8 experts, at most one copy a worker
        self.world = World(num_attention, num_experts, min(spare, most))

    def _name(self, number: int) -> str:
        names = sorted(self.world.workers)
        return names[number % len(names)]

    # ---- what workers do --------------------------------------------------------------------

    @rule(number=NUMBERS)
    def take(self, number: int) -> None:
        model = self.world.workers[self._name(number)]
        if model.is_awake and model.inbox:
            self.world.take(model.name)

    @rule()
    def take_all(self) -> None:
        self.world.take_all(*self.world.workers)

    @rule()
    def load_all(self) -> None:
        for name in list(self.world.workers):
            self.world.load(name)

    @rule()
    def come_up(self) -> None:
        for name in list(self.world.workers):
            self.world.come_up(name)

    @rule(number=NUMBERS)
    def lose_disk(self, number: int) -> None:
        self.world.workers[self._name(number)].disk_error = "the checkpoint is gone"

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        self.world.step(count)

    @rule()
    def beat(self) -> None:
        self.world.beat()

    @rule(number=NUMBERS)
    def call(self, number: int) -> None:
        """A worker calls the restarted controller."""
        world, model = self.world, self.world.workers[self._name(number)]
        if world.collector is not None and world.awaits(model):
            world.greet(model.name)

    # ---- faults -----------------------------------------------------------------------------

    @rule(number=NUMBERS)
    def crash(self, number: int) -> None:
        if not self.world.workers[self._name(number)].is_dead:
            self.world.crash(self._name(number))

    @rule(number=NUMBERS)
    def freeze(self, number: int) -> None:
        self.world.workers[self._name(number)].is_frozen = True

    @rule()
    def thaw(self) -> None:
        for model in self.world.workers.values():
            model.is_frozen = False

    @rule(number=NUMBERS, other=NUMBERS)
    def blame(self, number: int, other: int) -> None:
        """A worker that runs a generation has lost a peer in this generation."""
        model, peer = self.world.workers[self._name(number)], self._name(other)
        members = {m.name for m in model.generation.members} - {model.name}
        if model.is_awake and model.runs and peer in members:
            model.runs = False
            model.loss = PeerLost(worker=peer, generation=model.generation.number, reason="reset")
            self.world.tell(model.name, model.loss)

    @rule(number=NUMBERS)
    def fence(self, number: int) -> None:
        """A worker's lease has expired."""
        model = self.world.workers[self._name(number)]
        if model.is_awake and model.generation.number:
            model.is_fenced, model.runs = True, False

    @precondition(lambda self: self.world.controller is not None)
    @rule(unsent=st.integers(0, 3))
    def crash_controller(self, unsent: int) -> None:
        self.world.crash_controller(unsent)

    @precondition(lambda self: self.world.collector is not None)
    @rule()
    def crash_collector(self) -> None:
        self.world.crash_controller(0)

    @precondition(lambda self: self.world.controller is None and self.world.collector is None)
    @rule()
    def restart_controller(self) -> None:
        self.world.restart_controller()

    # ---- time and orders --------------------------------------------------------------------

    @rule(tenths=st.sampled_from([1, 3, 10, 25, 110]))
    def tick(self, tenths: int) -> None:
        self.world.tick(tenths / 10)

    @rule()
    def reap(self) -> None:
        self.world.reap()

    @rule(number=NUMBERS)
    def drain(self, number: int) -> None:
        controller, name = self.world.controller, self._name(number)
        if controller is None or name not in controller.cluster.workers:
            return
        with suppress(ConflictError):  # refused by name
            controller.draining.begin(DrainCommand(worker=name, limit_s=5.0), self.world.now)

    # ---- what must be so --------------------------------------------------------------------

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.thaw()
            self.world.calm_down()
            self.world.check()
            self.world.check_calm()


TestController = ControllerMachine.TestCase
TestController.settings = settings(
    max_examples=settings().max_examples // 2,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
