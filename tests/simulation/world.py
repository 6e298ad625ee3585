"""One simulated cluster, from its start to its judgement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from cluster.config.cluster import ClusterConfig
from cluster.controller.membership import Phase
from cluster.controller.recovery import RecoveryProblem
from cluster.core.states import ClusterState
from cluster.core.topology import Generation
from tests.simulation.clients import Clients
from tests.simulation.configuration import cluster_config
from tests.simulation.coverage import occurrences, requests_by_feature
from tests.simulation.disk import Disk
from tests.simulation.earlier_blocks import leave_blocks
from tests.simulation.faults import Faults
from tests.simulation.file_disk import LOCAL_S, SHARED_S, FileDisk, file_disk
from tests.simulation.gateways import SimGateway
from tests.simulation.kernel import Kernel
from tests.simulation.leaks import QUIET_S, leaks
from tests.simulation.network import Network
from tests.simulation.nodes import HEAD
from tests.simulation.outcomes import Outcome
from tests.simulation.patches import replaced
from tests.simulation.ray import SimController, SimRay
from tests.simulation.scenario import (
    MIN_ATTENTION,
    MIN_EXPERTS,
    MIN_FAULTS,
    MIN_GATEWAYS,
    MIN_REQUESTS,
    MIN_STEPS,
    SPAN_S,
    Scenario,
)
from tests.simulation.toy_model import banks

_START_LIMIT_S = 60.0
HEAL_S = 90.0
"""Virtual time after the last fault in which everything must serve."""
_CHECK_S = 0.05
_SETTLE_S = 0.5
"""Time after the last request and the last fault in which something may still happen."""


class Broken(Exception):
    """A property does not hold."""


class World:
    """See the module."""

    def __init__(self, scenario: Scenario, on_log: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.kernel = Kernel(scenario.seed)
        self.kernel.on_log = on_log
        self.kernel.on_running = self._check_runnable
        self.kernel.preemption = scenario.preemption
        self.kernel.slowness = scenario.slowness
        self.kernel.pool_delay_s = scenario.pool_delay_s
        self.kernel.num_banks = scenario.num_banks
        self.kernel.disk = Disk(self.kernel)
        self.net = Network(self.kernel)
        self.ray = SimRay(self.kernel, self.net, scenario)
        self.gateways: list[SimGateway] = []
        self.faults = Faults(self)
        self.clients = Clients(self)
        self.highest_step = 0
        self.occurred: Counter[str] = Counter()
        """What has occurred how often; known in the end."""
        self.state: FileDisk | None = None
        """The gateways' disk, where they store objects of clients."""
        self.kv_disk: FileDisk | None = None
        """Those of the workers' hosts, where they keep KV blocks."""
        self.num_restarts = 0
        """Gateways that were started in the place of others."""
        self._began_at = self._quiet_at = 0.0
        self._names: dict[int, tuple[Generation, tuple[str, ...]]] = {}

    def run(self) -> None:
        """Live through the scenario. Raises ``Broken``."""
        with ExitStack() as held:
            if "state" in self.scenario.features:
                disk = file_disk(self.kernel, SHARED_S)
                self.state = self.kernel.state = held.enter_context(disk)
            if self.scenario.keeps_on_disk:
                disk = file_disk(self.kernel, LOCAL_S)
                self.kv_disk = self.kernel.kv_disk = held.enter_context(disk)
            held.enter_context(replaced(self.kernel, self.net))
            held.enter_context(self.faults.hand_overs.watched())
            self._leave_blocks()
            self._start()
            for fault in self.scenario.faults:
                self.kernel.after(fault.at_s, self.faults.begin, fault)
            self.clients.begin()
            began_at = self._began_at = self.kernel.now
            ends = [a.at_s for a in self.scenario.asks]
            ends += [fault.at_s + fault.lasts_s for fault in self.scenario.faults]
            self._quiet_at = began_at + max(ends, default=0.0) + _SETTLE_S
            self.kernel.after(_CHECK_S, self._check_often)
            last_at = max((fault.at_s for fault in self.scenario.faults), default=0.0)
            self._run_until(began_at + max(SPAN_S, last_at), self._is_over)
            self._run_until(self.kernel.now + SPAN_S, self._has_failed)
            self.kernel.log("heal")
            self.faults.heal()
            self._run_until(self.kernel.now + HEAL_S, self._is_calm)
            self._check_in_the_end()
            self.clients.read_all()
            self._run_until(self.kernel.now + QUIET_S)
            self._check_leaks()
            self.occurred = occurrences(self)

    # ---- life -------------------------------------------------------------------------------

    def _leave_blocks(self) -> None:
        """Another cluster has used the disks of some scenarios."""
        scenario = self.scenario
        if self.kv_disk is not None and scenario.seed % 2:
            for rank in range(scenario.num_attention):
                host = self.ray.host_of("attention", rank)
                leave_blocks(self.kv_disk.folder / host, rank, scenario.asks)

    def _start(self) -> None:
        config = self._config()
        first = self.ray.start_controller(was_restarted=False)
        shape = [
            {"bank": b.bank, "layer": b.layer, "num_experts": b.num_experts, "top_k": b.top_k}
            for b in banks()
        ]
        loop = first.process.loop
        first.process.run(
            loop.call_soon,
            lambda: loop.create_task(first.actor.start(config.to_dict(), shape)),
        )
        for number in range(self.scenario.num_gateways):
            self._start_gateway(number)
        if not self._run_until(self.kernel.now + _START_LIMIT_S, lambda: self._serves(first)):
            raise Broken(f"the cluster does not start: {self._state(first)}")

    def _start_gateway(self, number: int) -> None:
        """A replica, or one in the place of another that has died."""
        host = HEAD if not number else f"gateway-{number}"
        name = f"gateway-{number}" + (f".{self.num_restarts}" if self.num_restarts else "")
        gateway = SimGateway(self.ray, name, host, self._config())
        gateway.on_over = self.clients.go_on
        self.gateways.append(gateway)
        if "restarts" in self.scenario.features:
            gateway.process.on_death.append(partial(self._gateway_died, number, gateway))

    def _gateway_died(self, number: int, gateway: SimGateway) -> None:
        """Another one starts soon, and clients that have no answer ask others again."""
        self.kernel.after(self.kernel.rng.uniform(0.3, 2.0), self._restart_gateway, number)
        self.clients.ask_others(gateway)

    def _restart_gateway(self, number: int) -> None:
        self.num_restarts += 1
        self._start_gateway(number)

    def _config(self) -> ClusterConfig:
        state = None if self.state is None else self.state.folder / "state"
        kv_disk = None if self.kv_disk is None else self.kv_disk.folder
        return cluster_config(self.scenario, state, kv_disk)

    def _run_until(self, when: float, is_done: Callable[[], bool] = lambda: False) -> bool:
        done = self.kernel.run(when, is_done)
        self._check()
        return done

    # ---- properties -------------------------------------------------------------------------

    def sizes(self) -> dict[str, tuple[int, int]]:
        """How large this was, and how large it is at least."""
        scenario = self.scenario
        return {
            "attention workers": (scenario.num_attention, MIN_ATTENTION),
            "expert workers": (scenario.num_experts, MIN_EXPERTS),
            "gateways": (len(self.gateways), MIN_GATEWAYS),
            "requests": (len(self.clients.outcomes), MIN_REQUESTS),
            "committed steps": (self.highest_step, MIN_STEPS),
            "faults": (self.faults.num_begun, MIN_FAULTS),
            **{f"requests of {name}": (n, 1) for name, n in requests_by_feature(self).items()},
        }

    def _ask_on(self) -> None:
        """Another request, while there are not enough committed steps."""
        scenario = self.scenario
        is_time = self.kernel.now >= self._began_at + scenario.asks_on_at_s
        if is_time and self.highest_step < scenario.num_steps and self._have_ended():
            self.clients.ask_on()

    def _check_often(self) -> None:
        self._check()
        self._ask_on()
        self.kernel.after(_CHECK_S, self._check_often)

    def _check(self) -> None:
        """Safety: what must hold at every moment."""
        self._check_runnable()
        self._check_loads()
        if self.kernel.failures:
            raise Broken("; ".join(self.kernel.failures))

    def _check_runnable(self) -> None:
        """At most one generation can run: looked at whenever a worker begins to run one."""
        runnable = self._runnable()
        self.faults.domains.runs(max((number for number, _ in runnable), default=0))
        if len(runnable) > 1:
            self.kernel.failures.append(f"generations {sorted(runnable)} can all run")

    def _check_loads(self) -> None:
        """No worker counts as one that cannot load whose host reads the checkpoint."""
        controller = self.ray.controller
        found = controller.actor.runner.controller if controller is not None else None
        for problem in found.recovery.problems(0.0) if found is not None else ():
            name, _, why = problem.partition(f" {RecoveryProblem.CANNOT_LOAD}")
            worker = self.ray.actors.ever.get(name)
            if why and worker is not None and worker.process.host not in self.faults.unreadable:
                raise Broken(problem)

    def _runnable(self) -> set[tuple[int, tuple[str, ...]]]:
        """Generations that could commit a step: all their members live and run them."""
        running: dict[tuple[int, tuple[str, ...]], int] = {}
        for worker in self.ray.actors.workers.values():
            membership = worker.worker.membership
            if membership.is_running and not worker.is_dead:
                generation = membership.generation
                key = generation.number, self._names_of(generation)
                running[key] = running.get(key, 0) + 1
                highest_step = worker.worker.membership._channel.highest_step
                if highest_step > self.highest_step:
                    self.highest_step = highest_step
        return {key for key, count in running.items() if count == len(key[1])}

    def _names_of(self, generation: Generation) -> tuple[str, ...]:
        """The members' names, made once for each worker's copy of a generation."""
        known = self._names.get(id(generation))
        if known is None or known[0] is not generation:
            names = tuple(m.name for m in generation.members)
            known = self._names[id(generation)] = generation, names
        return known[1]

    def _is_over(self) -> bool:
        """Nothing happens any more before the end of the span."""
        return self.kernel.now >= self._quiet_at and self._has_failed() and self._is_calm()

    def _has_failed(self) -> bool:
        """All faults have begun, and those are over that must not be healed before."""
        have_begun = self.faults.num_begun == len(self.scenario.faults)
        return have_begun and self.kernel.now >= self.faults.last_until

    def _is_calm(self) -> bool:
        controller = self.ray.controller
        return (
            controller is not None
            and self.highest_step >= self.scenario.num_steps
            and self._serves(controller)
            and self._have_ended()
        )

    def _have_ended(self) -> bool:
        return all(o.is_over for o in self._living_outcomes())

    def living_gateways(self) -> list[SimGateway]:
        """Gateways whose processes have not ended."""
        return [gateway for gateway in self.gateways if not gateway.process.is_dead]

    def _living_outcomes(self) -> list[Outcome]:
        """Requests whose gateway lives."""
        return [o for gateway in self.living_gateways() for o in gateway.outcomes]

    def _check_in_the_end(self) -> None:
        """Liveness: healed, and time enough."""
        controller = self.ray.controller
        if controller is None or not self._serves(controller):
            raise Broken(f"the cluster does not serve again: {self._state(controller)}")
        self._check_ends()
        if problem := self.faults.domains.problem():
            raise Broken(problem)
        for outcome in self._living_outcomes():
            if not outcome.is_over:
                raise Broken(f"{outcome.ask.name} does not end ({outcome.num_tokens} tokens)")
            if "oisonous" in outcome.code and len(self.ray.actors.ever) >= self._most_workers():
                continue  # that many deaths may have met one request
            is_fine = outcome.has_left or outcome.is_late or outcome.was_refused
            if not (is_fine or outcome.is_right):
                raise Broken(
                    f"{outcome.ask.name} ends with {outcome.ends}: {outcome.code} {outcome.error}"
                )

    def _check_leaks(self) -> None:
        """Nothing is left of requests that are over, and the cluster serves on."""
        controller = self.ray.controller
        if controller is None or not self._serves(controller):
            raise Broken(f"the cluster serves no more: {self._state(controller)}")
        if self.kernel.failures:
            raise Broken("; ".join(self.kernel.failures))
        if left := leaks(self):
            raise Broken("; ".join(left))

    def _most_workers(self) -> int:
        """So many were started when a request may have met three deaths."""
        return self.scenario.num_attention + self.scenario.num_experts + 3

    def _check_ends(self) -> None:
        """No living worker was ended that no fault has touched."""
        for term, name, _ in self.ray.ends.asked:
            if not self._is_touched(name) and name not in self.kernel.deaths:
                raise Broken(f"term {term} ends {name}, which no fault has touched")
        for name, why in self.kernel.deaths.items():
            if not self._is_touched(name):
                raise Broken(f"{name} ends itself: {why}")

    def _is_touched(self, name: str) -> bool:
        host = self.ray.actors.ever[name].process.host
        is_bad = name in self.faults.guilty or host in self.faults.bad_hosts
        return is_bad or self.faults.may_be_removed(name)

    def _serves(self, controller: SimController) -> bool:
        found = controller.actor.runner.controller
        if found is None or found.cluster.round.phase is not Phase.RUNNING:
            return False
        if found.cluster.state is ClusterState.DEGRADED:
            problems = found.recovery.problems(0.0)
            return bool(problems) and all(self._is_left_out(problem) for problem in problems)
        return found.cluster.state is ClusterState.SERVING

    def _is_left_out(self, problem: str) -> bool:
        """A place is left out because its host could not read the checkpoint."""
        name, _, why = problem.partition(f" {RecoveryProblem.LEFT_OUT}")
        return bool(why) and self.ray.actors.ever[name].process.host in self.faults.unreadable

    def _state(self, controller: SimController | None) -> Any:
        if controller is None or controller.actor.runner.controller is None:
            return "no controller"
        found = controller.actor.runner.controller
        return found.cluster.state.value, found.cluster.error, found.recovery.problems(0.0)
