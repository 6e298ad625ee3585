"""One simulated cluster, from its start to its judgement."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.config.autoscale import AutoscaleSection
from cluster.config.cluster import ClusterConfig, EngineSection, ModelSection, WorkersSection
from cluster.config.expert_load import LoadSection, RebalanceSection
from cluster.config.gateway import GatewaySection
from cluster.config.kv_tiers import KvTiersSection
from cluster.config.lora import LoraSection
from cluster.config.speculation import SpeculationSection
from cluster.controller.parts.cluster import Phase
from cluster.controller.parts.recovery import Problem
from cluster.core.states import ClusterState
from cluster.core.topology import Generation
from tests.simulation.asks import Ask, next_turn
from tests.simulation.coverage import occurrences, requests_by_feature
from tests.simulation.disk import Disk
from tests.simulation.faults import Faults
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
    draw_more,
)
from tests.simulation.state_client import StateClient
from tests.simulation.state_disk import StateDisk, state_disk
from tests.simulation.toy_adapters import ADAPTERS
from tests.simulation.toy_model import BLOCK_TOKEN_BYTES, banks

_START_LIMIT_S = 60.0
_BLOCK_TOKENS = 4
HEAL_S = 90.0
"""Virtual time after the last fault in which everything must serve."""
_CHECK_S = 0.05
_STATE_S = 0.1
"""Time between two calls of the client of stored objects."""
_RELOAD_S = 1.0
"""Time between two looks of the operator for adapters that are not loaded."""
_AGAIN_S = 0.2
"""Time after which a client asks again whose gateway has died."""
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
        self.outcomes: list[Outcome] = []
        self.faults = Faults(self)
        self.highest_step = 0
        self.occurred: Counter[str] = Counter()
        """What has occurred how often; known in the end."""
        self.state: StateDisk | None = None
        """The gateways' disk, where they store objects of clients."""
        self.client = StateClient(
            scenario.seed, self.kernel.failures, lambda: self.faults.state_may_fail
        )
        self.num_restarts = 0
        """Gateways that were started in the place of others."""
        self._began_at = self._quiet_at = 0.0
        self._more: Iterator[Ask] = draw_more(scenario)
        self._names: dict[int, tuple[Generation, tuple[str, ...]]] = {}

    def run(self) -> None:
        """Live through the scenario. Raises ``Broken``."""
        with ExitStack() as held:
            held.enter_context(replaced(self.kernel, self.net))
            if "state" in self.scenario.features:
                self.state = self.kernel.state = held.enter_context(state_disk(self.kernel))
            self._start()
            for fault in self.scenario.faults:
                self.kernel.after(fault.at_s, self.faults.begin, fault)
            for ask in self.scenario.asks:
                self.outcomes.append(self.gateways[ask.gateway].ask(ask))
            began_at = self._began_at = self.kernel.now
            ends = [a.at_s for a in self.scenario.asks]
            ends += [fault.at_s + fault.lasts_s for fault in self.scenario.faults]
            self._quiet_at = began_at + max(ends, default=0.0) + _SETTLE_S
            self.kernel.after(_CHECK_S, self._check_often)
            self._use_state()
            if "adapters" in self.scenario.features:
                self._load_adapters()
            last_at = max((fault.at_s for fault in self.scenario.faults), default=0.0)
            self._run_until(began_at + max(SPAN_S, last_at), self._is_over)
            self._run_until(self.kernel.now + SPAN_S, self._has_failed)
            self.kernel.log("heal")
            self.faults.heal()
            self._run_until(self.kernel.now + HEAL_S, self._is_calm)
            self._check_in_the_end()
            self._read_all()
            self._run_until(self.kernel.now + QUIET_S)
            self._check_leaks()
            self.occurred = occurrences(self)

    # ---- life -------------------------------------------------------------------------------

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
        gateway.on_over = self._go_on
        self.gateways.append(gateway)
        if "restarts" in self.scenario.features:
            gateway.process.on_death.append(partial(self._gateway_died, number, gateway))

    def _gateway_died(self, number: int, gateway: SimGateway) -> None:
        """Another one starts soon, and clients that have no answer ask others again."""
        self.kernel.after(self.kernel.rng.uniform(0.3, 2.0), self._restart_gateway, number)
        for outcome in gateway.outcomes:
            if not outcome.is_over:
                at_s = max(outcome.begins_at - self.kernel.now, _AGAIN_S)
                ask = replace(outcome.ask, name=f"{outcome.ask.name}~", at_s=at_s)
                self._send(ask)

    def _restart_gateway(self, number: int) -> None:
        self.num_restarts += 1
        self._start_gateway(number)

    def _config(self) -> ClusterConfig:
        scenario = self.scenario
        return ClusterConfig(
            model=ModelSection(path="toy", served_model_name="toy"),
            cluster_token="secret",
            workers=WorkersSection(
                num_attention_workers=scenario.num_attention,
                num_expert_workers=scenario.num_experts,
                num_redundant_experts=scenario.num_redundant,
                cpus_per_worker=1.0,
                follow_nodes=scenario.hosts.are_followed,
                device="cpu",
            ),
            engine=EngineSection(
                block_size_tokens=_BLOCK_TOKENS,
                kv_cache_bytes=8 * _BLOCK_TOKENS * scenario.num_kv_blocks,
                max_num_seqs=8,
                max_num_batched_tokens=64,
                num_micro_batches=1,
            ),
            load=LoadSection(report_s=1.0, window_s=2.0, half_life_s=2.0),
            rebalance=RebalanceSection(
                enable_eplb=scenario.moves_experts,
                interval_s=2.0,
                max_move_fraction=0.5,
                slot_cost_pairs=0.0,
            ),
            autoscale=self._autoscale(),
            kv_tiers=self._kv_tiers(),
            gateway=self._gateway_section(),
            lora=LoraSection(lora_modules=self._lora_modules()),
            speculation=SpeculationSection(
                speculative_method="ngram" if "drafts" in scenario.features else "none"
            ),
        )

    def _gateway_section(self) -> GatewaySection:
        if self.state is None:
            return GatewaySection()
        return GatewaySection(state_dir=str(self.state.folder / "state"))

    def _lora_modules(self) -> tuple[str, ...]:
        if "adapters" not in self.scenario.features:
            return ()
        return tuple(f"{name}={path}" for name, path in ADAPTERS.items())

    def _load_adapters(self) -> None:
        """An operator loads those that are not loaded any more."""
        self.kernel.after(_RELOAD_S, self._load_adapters)
        controller = self.ray.controller
        found = controller.actor.runner.controller if controller is not None else None
        if found is not None and found.cluster.state is ClusterState.SERVING:
            known = [a["name"] for a in found.adapters.to_list() if a["state"] != "UNLOADING"]
            for name in sorted(ADAPTERS.keys() - {*known}):
                self.faults.order("load_adapter", {"name": name, "path": ADAPTERS[name]})

    def _kv_tiers(self) -> KvTiersSection:
        """Host memory for copies of a part of the blocks, or of all that there ever are."""
        scenario = self.scenario
        if "tiers" not in scenario.features:
            return KvTiersSection()
        rng = random.Random(f"tiers {scenario.seed}")
        block_bytes = BLOCK_TOKEN_BYTES * _BLOCK_TOKENS
        return KvTiersSection(
            kv_host_bytes=block_bytes * rng.choice((32, 128, 4000)),
            session_copy_bytes_per_s=rng.choice((1e3, 1e6)),
        )

    def _autoscale(self) -> AutoscaleSection:
        """Times as short as the scenario, and targets that its load exceeds now and then."""
        scenario = self.scenario
        if not scenario.autoscales or scenario.hosts.are_followed:
            return AutoscaleSection()
        return AutoscaleSection(
            autoscale="on",
            min_attention_workers=1,
            max_attention_workers=scenario.num_attention + 1,
            min_expert_workers=1,
            max_expert_workers=scenario.num_experts + 2,
            kv_target=0.3,
            slot_time_target=0.2,
            up_s=1.0,
            down_s=2.0,
            limit_s=5.0,
            queue_s=0.5,
            sample_s=0.25,
            retry_s=1.0,
        )

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
            "requests": (len(self.outcomes), MIN_REQUESTS),
            "committed steps": (self.highest_step, MIN_STEPS),
            "faults": (self.faults.num_begun, MIN_FAULTS),
            **{f"requests of {name}": (n, 1) for name, n in requests_by_feature(self).items()},
        }

    def _ask_on(self) -> None:
        """Another request, while there are not enough committed steps."""
        scenario = self.scenario
        is_time = self.kernel.now >= self._began_at + scenario.asks_on_at_s
        if is_time and self.highest_step < scenario.num_steps and self._have_ended():
            self._send(next(self._more))

    def _go_on(self, outcome: Outcome) -> None:
        """A client that has its answer takes the next turn of its conversation."""
        ask = None
        if outcome.is_right:
            room = _BLOCK_TOKENS * self.scenario.num_kv_blocks
            ask = next_turn(outcome.ask, outcome.choices[0].received, room)
        if ask is not None:
            self._send(ask)

    def _send(self, ask: Ask) -> None:
        """A client sends a request to a gateway that lives."""
        living = [g for g in self.gateways if not g.process.is_dead]
        if living:
            self.outcomes.append(living[ask.gateway % len(living)].ask(ask))
        else:
            self.kernel.after(_AGAIN_S, self._send, ask)

    def _use_state(self) -> None:
        """A client of stored objects, until all is over."""
        if self.state is not None and not self.faults.is_healed:
            self.kernel.after(_STATE_S, self._use_state)
            living = [g for g in self.gateways if not g.process.is_dead]
            if living:
                self.client.act(self.kernel.rng.choice(living))

    def _read_all(self) -> None:
        if self.state is not None:
            self.client.read_all(next(g for g in self.gateways if not g.process.is_dead))

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
        if len(runnable) > 1:
            self.kernel.failures.append(f"generations {sorted(runnable)} can all run")

    def _check_loads(self) -> None:
        """No worker counts as one that cannot load whose host reads the checkpoint."""
        controller = self.ray.controller
        found = controller.actor.runner.controller if controller is not None else None
        for problem in found.recovery.problems(0.0) if found is not None else ():
            name, _, why = problem.partition(f" {Problem.CANNOT_LOAD}")
            worker = self.ray.actors.ever.get(name)
            if why and worker is not None and worker.process.host not in self.faults.unreadable:
                raise Broken(problem)

    def _runnable(self) -> set[tuple[int, tuple[str, ...]]]:
        """Generations that could commit a step: all their members live and run them."""
        running: dict[tuple[int, tuple[str, ...]], int] = {}
        for worker in self.ray.actors.workers.values():
            membership = worker.runtime.membership
            if membership.runs and not worker.is_dead:
                generation = membership.generation
                key = generation.number, self._names_of(generation)
                running[key] = running.get(key, 0) + 1
                highest_step = worker.runtime.channel.highest_step
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

    def _living_outcomes(self) -> list[Outcome]:
        """Requests whose gateway lives."""
        return [o for g in self.gateways if not g.process.is_dead for o in g.outcomes]

    def _check_in_the_end(self) -> None:
        """Liveness: healed, and time enough."""
        controller = self.ray.controller
        if controller is None or not self._serves(controller):
            raise Broken(f"the cluster does not serve again: {self._state(controller)}")
        self._check_ends()
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
        name, _, why = problem.partition(f" {Problem.LEFT_OUT}")
        return bool(why) and self.ray.actors.ever[name].process.host in self.faults.unreadable

    def _state(self, controller: SimController | None) -> Any:
        if controller is None or controller.actor.runner.controller is None:
            return "no controller"
        found = controller.actor.runner.controller
        return found.cluster.state.value, found.cluster.error, found.recovery.problems(0.0)
