"""The faults, by name, and their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from cluster.actors.handoff import FIND_LIMIT_S
from cluster.core.errors import ExpertMeshError
from tests.simulation.configuration import num_prefill
from tests.simulation.disk import files
from tests.simulation.domains import Domains
from tests.simulation.file_disk import FAILURES, Ailment
from tests.simulation.hand_over_kills import HandOverKills
from tests.simulation.kernel import Process, Thread
from tests.simulation.nodes import HEAD, Node
from tests.simulation.ray import Hosts
from tests.simulation.scenario import RACK_FAULTS
from tests.simulation.toy_adapters import ADAPTERS
from workers.engine.step_tree import StepTree

if TYPE_CHECKING:
    from tests.simulation.scenario import Fault
    from tests.simulation.worker import SimWorker
    from tests.simulation.world import World

PROCESS_FAULTS = (
    "kill_worker",
    "kill_worker",
    "kill_worker",
    "kill_two_workers",
    "kill_again",
    "kill_attention",
    "pause_worker",
    "pause_thread",
    "pause_host",
    "kill_controller",
    "kill_controller",
    "pause_controller",
    "supersede_controller",
    "freeze_controller",
    "kill_gateway",
    "pause_gateway",
    "slow_disk",
    "break_disk",
    "slow_machine",
    "long_step",
    "step_clock",
)
DISK_FAULTS = ("change_file", "shorten_file", "flaky_disk", "fail_state", "fail_kv_disk")
LINK_FAULTS = (
    "reset_link",
    "duplicate_connections",
    "full_buffers",
    "blackhole_link",
    "blackhole_link",
    "slow_link",
    "isolate_worker",
    "isolate_head",
    "isolate_restart",
    "lose_calls",
)
ORDERS = ("drain_worker", "drain_node", "rebalance", "reload_adapter", "scale", "scale")
KINDS = (*PROCESS_FAULTS, *DISK_FAULTS, *LINK_FAULTS, *ORDERS)
"""Faults that scenarios draw from; those named twice come more often."""
INNER_FAULTS = ("kill_inner", "kill_inner", "pause_inner", "isolate_inner", "kill_inner_and_leader")
LARGE_KINDS = (*KINDS, *INNER_FAULTS, "kill_rack", "kill_rack_in_change", *RACK_FAULTS)
"""Those of a cluster in which headers take a second hop, and with racks."""
_SLOWS_CALLS = {
    "pause_worker",
    "pause_inner",
    "isolate_inner",
    "isolate_domain",
    "pause_thread",
    "pause_host",
    "slow_machine",
    *LINK_FAULTS,
} - {
    "reset_link",
    "duplicate_connections",
}
"""Faults that may keep a worker from calling a controller again at once."""
_SHORT_S = 0.2
"""A pause of this time is no reason to end a worker."""
_RACK = 8
"""Workers that share a rack."""
_SOON_S = 0.004
"""Time between two looks whether a generation forms."""
_CHANGE_S = 8.0
"""Longest time until one forms."""
_LOOK_S = 0.05
"""Time between two looks whether a new worker runs."""
_SICK_S = 3.0
"""Shortest time for which a disk with KV blocks fails: some of them should be wanted in it."""
_STATE_CALL_S = 30.0
"""Longest call for a stored object, on a disk that hangs and a gateway that stands still."""
_AGAIN_S = 0.25
"""Time after which a fault that finds nothing to hit tries again."""


class _NothingToHitError(Exception):
    """No such worker lives now, or nobody leads."""


class Faults:
    """Carries out the faults of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.domains = Domains(world)
        self.hand_overs = HandOverKills(world, self._kill_in_hand_over)
        self._paused: dict[Process, float] = {}
        """Processes that were paused, and when the last of their pauses ends."""
        self._held: list[Thread] = []
        self.is_healed = False
        self._state_fails_until = -inf
        self._kv_disk_fails_until: dict[str, float] = {}
        """By host."""
        self.num_begun = 0
        self.last_until = 0.0
        """Until when those last that must not be healed before."""
        self.guilty: dict[str, str] = {}
        """Workers that a fault has touched, and how: the controller may end them."""
        self.unreadable: set[str] = set()
        """Hosts that could not read the checkpoint: their workers may be left out for good."""
        self.bad_hosts: set[str] = set()
        """Hosts that a fault has touched: all their workers, later ones included, may end."""
        autoscales = world.scenario.autoscales
        self._least: dict[str, int] = {"attention": 1, "expert": 1} if autoscales else {}
        """Fewest workers of a role that were asked for."""
        world.ray.nodes.may_die = self._may_die
        world.ray.nodes.on_dead.append(self._node_dies)
        world.ray.nodes.on_end.append(self._node_ends)

    def begin(self, fault: Fault) -> None:
        """A fault happens, as soon as there is something to hit; one that lasts ends by itself."""
        if self.is_healed:
            return
        self._world.kernel.log("fault: %s", fault)
        try:
            getattr(self, fault.kind)(fault)
        except _NothingToHitError:
            self._world.kernel.after(_AGAIN_S, self.begin, fault)
        else:
            self.num_begun += 1

    def heal(self) -> None:
        """Nothing is wrong any more."""
        self.is_healed = True
        self._world.net.heal_all()
        self._world.net.restore_all_buffers()
        self._world.kernel.suspended.clear()
        for process in (*self._paused, *self._processes()):
            process.resume()
        for thread in self._held:
            thread.release()
        self._world.kernel.disk.repair()
        for disk in (self._world.state, self._world.kv_disk):
            if disk is not None:
                disk.ailments.clear()
        self._world.ray.actors.num_losses = 0
        self._world.kernel.slowness = self._world.scenario.slowness

    # ---- processes ----------------------------------------------------------------------------

    def kill_worker(self, fault: Fault) -> None:
        self._kill(self._worker(fault.where))

    def kill_two_workers(self, fault: Fault) -> None:
        first, second = self._worker(fault.where), self._worker(fault.other)
        self._kill(first)
        if second is not first:
            with suppress(_NothingToHitError):
                self._kill(second)

    def kill_again(self, fault: Fault) -> None:
        """A worker, and the next one in its place as soon as that runs with the others."""
        worker = self._worker(fault.where)
        self._kill(worker)
        self._kill_next(worker.name.split(".")[0])

    def _kill_next(self, place: str) -> None:
        for worker in self._workers():
            if worker.name.startswith(f"{place}.") and worker.worker.membership.is_running:
                with suppress(_NothingToHitError):
                    self._kill(worker.process)
                    return
        if not self.is_healed:
            self._world.kernel.after(_LOOK_S, self._kill_next, place)

    def kill_attention(self, fault: Fault) -> None:
        """All attention workers: nobody holds a request any more."""
        attention = [w.process for w in self._workers() if w.args.member.runs_attention]
        if not attention:
            raise _NothingToHitError
        self._kill(attention[0])
        for process in attention[1:]:
            with suppress(_NothingToHitError):
                self._kill(process)

    def kill_inner(self, fault: Fault) -> None:
        """A worker that sends headers on to others."""
        self._kill(self._inner(fault.where))

    def kill_rack(self, fault: Fault) -> None:
        """Eight workers at once, or half of them if they are fewer, every second one."""
        rack = self._workers()[fault.where % 2 :: 2][:_RACK]
        for worker in rack:
            with suppress(_NothingToHitError):
                self._kill(worker.process)

    def kill_half(self, fault: Fault) -> None:
        """The expert workers of a rack at once, which are half of all."""
        workers = self.domains.workers_of(fault.where)
        self._lose_rack([w for w in workers if w.args.member.holds_experts])

    def kill_domain(self, fault: Fault) -> None:
        """All workers of a rack at once, at every second number with the controller."""
        if fault.other % 2:
            with suppress(_NothingToHitError):
                self._replaceable_controller().kill()
        self._lose_rack(self.domains.workers_of(fault.where))

    def _lose_rack(self, workers: list[SimWorker]) -> None:
        if not workers:
            raise _NothingToHitError
        self.domains.lose(workers)
        for worker in workers:
            with suppress(_NothingToHitError):
                self._kill(worker.process)

    def isolate_domain(self, fault: Fault) -> None:
        """The hosts of a rack reach each other and no others."""
        rack = self.domains.hosts_of_last_rack()
        self._blame(*rack)
        for host in rack:
            self._isolate(host, fault.lasts_s, rack)

    def kill_inner_and_leader(self, fault: Fault) -> None:
        """The leader, and a worker that sends headers on; at every second number first that one."""
        leaders = {
            StepTree.of(worker.worker.membership.generation, worker.name).leader
            for worker in self._workers()
        }
        found = [w.process for w in self._workers() if w.name in leaders]
        pair = [self._inner(fault.where), *found]
        for process in pair if fault.other % 2 else pair[::-1]:
            with suppress(_NothingToHitError):
                self._kill(process)

    def kill_rack_in_change(self, fault: Fault) -> None:
        """A worker dies; while the others form the next generation, a rack dies, too, in every
        second one with the controller.
        """
        self._kill(self._worker(fault.where))
        self._when_forming(fault, self._world.kernel.now + _CHANGE_S)

    def _when_forming(self, fault: Fault, until: float) -> None:
        kernel, cluster = self._world.kernel, self.domains.cluster
        if cluster is None or not cluster.is_forming:
            if kernel.now < until and not self.is_healed:
                kernel.after(_SOON_S, self._when_forming, fault, until)
            return
        if fault.other % 2:
            with suppress(_NothingToHitError):
                self._replaceable_controller().kill()
        kernel.after(
            _SOON_S * (fault.other % 10), self._begin_more, replace(fault, kind="kill_rack")
        )

    def pause_inner(self, fault: Fault) -> None:
        """A worker that sends headers on to others stands still."""
        worker = self._inner(fault.where)
        self._blame_worker(worker, "paused", fault)
        self._pause(worker, fault.lasts_s)

    def pause_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        self._blame_worker(worker, "paused", fault)
        self._pause(worker, fault.lasts_s)

    def pause_thread(self, fault: Fault) -> None:
        """One thread of a worker, or one event loop, stands still; the others go on."""
        worker = self._worker(fault.where)
        threads = worker.threads()
        if not threads:  # it ends
            raise _NothingToHitError
        thread = threads[fault.other % len(threads)]
        self._blame_worker(worker, "paused in part", fault)
        thread.hold()
        self._held.append(thread)
        self._world.kernel.after(fault.lasts_s, thread.release)

    def kill_controller(self, fault: Fault) -> None:
        self._replaceable_controller().kill()

    def kill_gateway(self, fault: Fault) -> None:
        """Not the last one, which stands still, unless another one is started in its place."""
        living = [g for g in self._world.gateways if not g.process.is_dead]
        if not living:
            raise _NothingToHitError
        process = living[fault.where % len(living)].process
        if not self._kill_one_gateway(process):
            self._pause(process, fault.lasts_s)

    def _kill_one_gateway(self, process: Process) -> bool:
        """Return whether it was killed: not the last one that is not replaced."""
        living = [g for g in self._world.gateways if not g.process.is_dead]
        may_die = len(living) > 1 or "restarts" in self._world.scenario.features
        if may_die:
            process.kill()
        return may_die

    def kill_in_hand_over(self, fault: Fault) -> None:
        """A process dies when a request moves to the decode group; see ``HandOverKills``."""
        self.hand_overs.wait(fault)

    def _kill_in_hand_over(self, process: Process | None) -> None:
        with suppress(_NothingToHitError):
            if process is None:
                self._replaceable_controller().kill()
            elif process in [gateway.process for gateway in self._world.gateways]:
                self._kill_one_gateway(process)
            else:
                self._kill(process)

    def pause_controller(self, fault: Fault) -> None:
        controller = self._world.ray.controller
        if controller is None:
            raise _NothingToHitError
        self._pause(controller.process, fault.lasts_s)

    def supersede_controller(self, fault: Fault) -> None:
        """Ray takes a living controller for dead."""
        self._replaceable_controller()
        self._world.ray.supersede()

    def freeze_controller(self, fault: Fault) -> None:
        """Ray takes a controller for dead that stands still; a worker dies before it goes on."""
        self._pause(self._replaceable_controller(), fault.lasts_s + _SHORT_S)
        self._world.ray.supersede()
        kill = replace(fault, kind="kill_worker")
        self._world.kernel.after(_SHORT_S / 2, self._begin_more, kill)

    def pause_host(self, fault: Fault) -> None:
        """All processes of a host stand still: a suspended machine, or a moved one."""
        kernel, host = self._world.kernel, self._hosts()[fault.where % len(self._hosts())]
        kernel.suspended[host] = kernel.now + fault.lasts_s
        for process in self._processes():
            if process.host == host:
                self._pause(process, fault.lasts_s)
        all_stand_still = self._world.scenario.hosts is Hosts.ONE and host == HEAD
        if fault.lasts_s > _SHORT_S and not all_stand_still:
            self._blame(host)

    def pause_gateway(self, fault: Fault) -> None:
        gateways = self._world.gateways
        self._pause(gateways[fault.where % len(gateways)].process, fault.lasts_s)

    # ---- machines -----------------------------------------------------------------------------

    def slow_disk(self, fault: Fault) -> None:
        disk = self._world.kernel.disk
        disk.slow_down()
        self._world.kernel.after(fault.lasts_s, disk.recover)

    def break_disk(self, fault: Fault) -> None:
        """Nothing can be read on a host for a while."""
        worker, disk = self._worker(fault.where), self._world.kernel.disk
        self._blame(worker.host)
        self.unreadable.add(worker.host)
        disk.broken_hosts.add(worker.host)
        self._world.kernel.after(fault.lasts_s, disk.broken_hosts.discard, worker.host)

    def flaky_disk(self, fault: Fault) -> None:
        """One of ten reads fails on a host for a while."""
        worker, disk = self._worker(fault.where), self._world.kernel.disk
        self._blame(worker.host)
        self.unreadable.add(worker.host)
        disk.flaky_hosts.add(worker.host)
        self._world.kernel.after(fault.lasts_s, disk.flaky_hosts.discard, worker.host)

    def change_file(self, fault: Fault) -> None:
        """A file of the checkpoint is overwritten in place, and restored later; at every second
        number, once somebody reads it."""
        disk = self._world.kernel.disk
        self._damage_file(fault, disk.change_when_read if fault.where % 2 else disk.change)

    def shorten_file(self, fault: Fault) -> None:
        """A file of the checkpoint is cut off, and restored later."""
        self._damage_file(fault, self._world.kernel.disk.shorten)

    def _damage_file(self, fault: Fault, damage: Callable[[str, str], None]) -> None:
        worker = self._worker(fault.where)
        host, name = worker.host, files()[fault.other % len(files())]
        self._world.kernel.log("%s on %s", name, host)
        self._blame(host)
        self.unreadable.add(host)
        damage(host, name)
        self._world.kernel.after(fault.lasts_s, self._world.kernel.disk.restore, host, name)

    def fail_state(self, fault: Fault) -> None:
        """The gateways' disk fails, is full, or hangs; where none is used, another one is slow."""
        kernel, state = self._world.kernel, self._world.state
        if state is None:
            self.slow_disk(fault)
            return
        ailment = FAILURES[fault.where % len(FAILURES)]
        state.ailments = dict.fromkeys(self._hosts(), ailment)
        kernel.log("%s", ailment.value)
        self._state_fails_until = kernel.now + fault.lasts_s
        kernel.at(self._state_fails_until, self._end_state_failure)

    def _end_state_failure(self) -> None:
        state, now = self._world.state, self._world.kernel.now
        if state is not None and now >= self._state_fails_until:
            state.ailments.clear()

    def fail_kv_disk(self, fault: Fault) -> None:
        """The disk of an attention worker's host fails, is full, hangs or rots; where it has no KV
        blocks, another one is slow. No worker may end for it."""
        kernel, disk = self._world.kernel, self._world.kv_disk
        if disk is None:
            self.slow_disk(fault)
            return
        hosts = [w.process.host for w in self._workers() if w.args.member.runs_attention]
        if not hosts:
            raise _NothingToHitError
        host, kinds = hosts[fault.where % len(hosts)], (*FAILURES, Ailment.ROTS)
        disk.ailments[host] = kinds[fault.other % len(kinds)]
        kernel.log("the disk of %s: %s", host, disk.ailments[host].value)
        until = self._kv_disk_fails_until[host] = kernel.now + fault.lasts_s + _SICK_S
        kernel.at(until, self._end_kv_disk_failure, host)

    def _end_kv_disk_failure(self, host: str) -> None:
        disk = self._world.kv_disk
        if disk is not None and self._world.kernel.now >= self._kv_disk_fails_until[host]:
            disk.ailments.pop(host, None)

    @property
    def state_may_fail(self) -> bool:
        """The gateways' disk does, or did when a call of a moment ago began."""
        return self._world.kernel.now < self._state_fails_until + _STATE_CALL_S

    def long_step(self, fault: Fault) -> None:
        """The next computation of a worker takes long."""
        worker = self._worker(fault.where)
        self._blame_worker(worker, "computes", fault)
        worker.stall_s += fault.lasts_s

    def step_clock(self, fault: Fault) -> None:
        """The clock of a host is set, by up to an hour."""
        kernel, host = self._world.kernel, self._hosts()[fault.where % len(self._hosts())]
        kernel.clocks[host] = kernel.clock(host) + kernel.rng.uniform(-3600, 3600)

    def slow_machine(self, fault: Fault) -> None:
        """Everything takes ten times as long to compute."""
        kernel = self._world.kernel
        usual = self._world.scenario.slowness
        kernel.slowness = 10 * usual

        def end() -> None:
            kernel.slowness = usual

        kernel.after(fault.lasts_s, end)

    # ---- links --------------------------------------------------------------------------------

    def reset_link(self, fault: Fault) -> None:
        first, second = self._two_hosts(fault)
        self._blame_path(first, second)
        self._world.net.reset(first, second)

    def duplicate_connections(self, fault: Fault) -> None:
        """One host forgets its connections to another one, which learns it when it sends: until
        then there is an old connection beside a new one."""
        first, second = self._two_hosts(fault)
        self._blame_path(first, second)
        self._world.net.forget(first, second)

    def full_buffers(self, fault: Fault) -> None:
        """A host's buffers take less than a frame at a time."""
        host = self._hosts()[fault.where % len(self._hosts())]
        self._world.net.shrink_buffers(host)
        self._world.kernel.after(fault.lasts_s, self._world.net.restore_buffers, host)

    def blackhole_link(self, fault: Fault) -> None:
        """One direction; the other one as well at every second number."""
        net, (first, second) = self._world.net, self._two_hosts(fault)
        self._blame(first, second)
        pairs = [(first, second)] if fault.where % 2 else [(first, second), (second, first)]
        for pair in pairs:
            net.block(*pair)
            self._world.kernel.after(fault.lasts_s, net.heal, *pair)

    def slow_link(self, fault: Fault) -> None:
        net, (first, second) = self._world.net, self._two_hosts(fault)
        net.slow(first, second, min(fault.lasts_s, 0.3) / 2)
        self._world.kernel.after(fault.lasts_s, net.quicken, first, second)

    def isolate_worker(self, fault: Fault) -> None:
        """A host neither sends nor receives."""
        self._isolate_host(self._worker(fault.where), fault)

    def isolate_inner(self, fault: Fault) -> None:
        """The host of a worker that sends headers on neither sends nor receives."""
        self._isolate_host(self._inner(fault.where), fault)

    def _isolate_host(self, worker: Process, fault: Fault) -> None:
        self._blame(worker.host)
        if worker.host == HEAD:
            self.isolate_head(fault)
        else:
            self._isolate(worker.host, fault.lasts_s)

    def isolate_head(self, fault: Fault) -> None:
        """A blip at the host of the controller and of Ray: most workers are not at fault."""
        self._isolate(HEAD, fault.lasts_s)
        self._blame_last(self._world.kernel.now + fault.lasts_s)

    def isolate_restart(self, fault: Fault) -> None:
        """The same, and longer than another controller looks for the workers."""
        controller, lasts_s = self._replaceable_controller(), FIND_LIMIT_S + fault.lasts_s
        self.last_until = max(self.last_until, self._world.kernel.now + lasts_s)
        self.isolate_head(replace(fault, lasts_s=lasts_s))
        controller.kill()

    def _blame_last(self, until: float) -> None:
        """A single worker that is away from the head and silent counts as lost."""
        away = [process.host for process in self._witnesses() if process.host != HEAD]
        if len(away) == 1:
            self._blame(*away)
        if self._world.kernel.now < until:
            self._world.kernel.after(_LOOK_S, self._blame_last, until)

    def lose_calls(self, fault: Fault) -> None:
        """Ray loses calls of actors, or their answers, and says so; a controller looks for its
        workers then.
        """
        actors = self._world.ray.actors
        controller = self._replaceable_controller()
        actors.num_losses += 1
        controller.kill()

        def end() -> None:
            actors.num_losses = max(actors.num_losses - 1, 0)

        self._world.kernel.after(fault.lasts_s, end)

    # ---- commands of operators ----------------------------------------------------------------

    def drain_worker(self, fault: Fault) -> None:
        worker = self._worker(fault.where)
        self.command("drain", {"worker": worker.name, "limit_s": max(fault.lasts_s, 1.0)})
        self.guilty[worker.name] = "drained"

    def drain_node(self, fault: Fault) -> None:
        """Ray drains a node, which ends when its workers have left, or at its limit; of the host of
        Ray's head a worker."""
        worker, actors = self._worker(fault.where), self._world.ray.actors
        if worker.host == HEAD:
            self.drain_worker(fault)
            return
        self._blame(worker.host)
        self._world.ray.nodes.drain(
            worker.host, fault.lasts_s + _SHORT_S, lambda node: not actors.on_node(node)
        )

    def rebalance(self, fault: Fault) -> None:
        self.command("rebalance", {})

    def reload_adapter(self, fault: Fault) -> None:
        """An adapter is unloaded; the operator loads it again. Without any, experts move."""
        if "adapters" in self._world.scenario.features:
            name = sorted(ADAPTERS)[fault.where % len(ADAPTERS)]
            self.command("unload_adapter", {"name": name})
        else:
            self.rebalance(fault)

    def scale(self, fault: Fault) -> None:
        """One or two workers more or less of each role than at the start, or as many."""
        scenario = self._world.scenario
        attention = max(scenario.num_attention + fault.where % 3 - 1, 1)
        order = {"attention": attention}
        if (prefill := num_prefill(scenario)) > 0:
            prefill = max(prefill + fault.other % 3 - 1, 1)
            decode = max(attention - prefill, 1)
            attention, order = prefill + decode, {"prefill": prefill, "decode": decode}
        expert = max(scenario.num_experts + fault.other % 4 - 1, 1)
        limit_s = 2.0 + 4.0 * fault.lasts_s
        for role, count in (("attention", attention), ("expert", expert)):
            self._least[role] = min(self._least.get(role, count), count)
        self.command("scale", {**order, "expert": expert, "limit_s": limit_s})

    def may_be_removed(self, name: str) -> bool:
        """Scaling may end it: its rank is high, or it has not served yet in a place of another.

        A cluster that follows its hosts scales itself.
        """
        place, _, number = name.partition(".")
        role, _, rank = place.partition("-")
        least = min(self._least.get(role, int(rank) + 1), self._initial(role))
        scales = role in self._least or self._world.scenario.hosts.are_followed
        return scales and (bool(number) or int(rank) >= least)

    def _initial(self, role: str) -> int:
        scenario = self._world.scenario
        return scenario.num_attention if role == "attention" else scenario.num_experts

    # ---- small things -------------------------------------------------------------------------

    def _worker(self, number: int) -> Process:
        """A living worker."""
        workers = self._workers()
        if not workers:
            raise _NothingToHitError
        return workers[number % len(workers)].process

    def _inner(self, number: int) -> Process:
        """A worker between the leader and others, or any one where all are next to the leader."""
        inner = {
            name
            for worker in self._workers()
            for name in StepTree.of(worker.worker.membership.generation, worker.name).inner
        }
        workers = [w for w in self._workers() if w.name in inner] or self._workers()
        if not workers:
            raise _NothingToHitError
        return workers[number % len(workers)].process

    def _workers(self) -> list[SimWorker]:
        """Workers that live, and that Ray does not take for dead."""
        actors = self._world.ray.actors
        return [worker for name, worker in actors.workers.items() if name in actors.alive]

    def _replaceable_controller(self) -> Process:
        """The controller, if another one could continue."""
        controller = self._world.ray.controller
        if controller is None or not self._witnesses():
            raise _NothingToHitError
        return controller.process

    def _begin_more(self, fault: Fault) -> None:
        """What belongs to another fault."""
        with suppress(_NothingToHitError):
            getattr(self, fault.kind)(fault)

    def _blame_worker(self, worker: Process, how: str, fault: Fault) -> None:
        if fault.lasts_s > _SHORT_S:
            self.guilty[worker.name] = how

    def _kill(self, process: Process) -> None:
        """Not the last one that knows the cluster: without any, it would be lost for good."""
        if not self._leads() and all(witness is process for witness in self._witnesses()):
            raise _NothingToHitError
        self.guilty[process.name] = "killed"
        process.kill()

    def _leads(self) -> bool:
        """A controller knows the cluster."""
        found = self._world.ray.controller
        return found is not None and found.term > 0 and not found.process.is_paused

    def _may_die(self, node: Node) -> bool:
        """Not the last node with a worker that knows the cluster, either."""
        return self._leads() or any(w.host != node.host for w in self._witnesses())

    def _node_dies(self, node: Node) -> None:
        """All its workers are dead to Ray."""
        self._blame(node.host)

    def _node_ends(self, node: Node) -> None:
        """The gateway of a host ends with its node; the last one stays."""
        self._blame(node.host)
        living = [g.process for g in self._world.gateways if not g.process.is_dead]
        for process in living:
            if process.host == node.host and len(living) > 1:
                process.kill("Ray's node ends")

    def _witnesses(self) -> list[Process]:
        """Living workers that know a generation, and that another controller would find."""
        living = (w for w in self._workers() if not w.worker.lifetime.is_ending)
        return [w.process for w in living if w.worker.membership.generation.number]

    def _processes(self) -> list[Process]:
        """All of them, controllers that Ray has given up included."""
        world = self._world
        found = [w.process for w in world.ray.actors.workers.values()]
        found += [g.process for g in world.gateways]
        return found + [c.process for c in world.ray.controllers]

    def _pause(self, process: Process, lasts_s: float) -> None:
        kernel = self._world.kernel
        process.pause()
        self._paused[process] = max(kernel.now + lasts_s, self._paused.get(process, 0.0))
        kernel.at(self._paused[process], self._resume, process)

    def _resume(self, process: Process) -> None:
        if self._world.kernel.now >= self._paused[process]:
            process.resume()

    def _isolate(self, host: str, lasts_s: float, reached: Sequence[str] = ()) -> None:
        """A host reaches only itself and those in ``reached``."""
        net = self._world.net
        for other in self._hosts():
            if other not in (host, *reached):
                for pair in ((host, other), (other, host)):
                    net.block(*pair)
                    self._world.kernel.after(lasts_s, net.heal, *pair)

    def _two_hosts(self, fault: Fault) -> tuple[str, str]:
        hosts = self._hosts()
        first = hosts[fault.where % len(hosts)]
        others = [host for host in hosts if host != first]
        return first, others[fault.other % len(others)]

    def _blame(self, *hosts: str) -> None:
        self.bad_hosts |= set(hosts)

    def _blame_path(self, *hosts: str) -> None:
        """Workers call a controller again whose connections to them have broken, if nothing else
        keeps them from it. Of two workers that lose each other one may end.
        """
        have_workers = {w.process.host for w in self._world.ray.actors.workers.values()}
        kinds = {fault.kind for fault in self._world.scenario.faults}
        if HEAD not in hosts or have_workers.issuperset(hosts) or kinds & _SLOWS_CALLS:
            self._blame(*hosts)

    def command(self, kind: str, command: dict[str, Any]) -> None:
        """An operator's call of the controller."""
        controller = self._world.ray.controller
        if controller is None or controller.process.is_dead:
            raise _NothingToHitError
        loop = controller.process.loop

        async def call() -> None:
            try:
                answer: Any = await controller.actor.begin(kind, command)
            except (ExpertMeshError, TimeoutError) as err:  # refused by name, or too slow
                answer = err
            self._world.kernel.log("%s: %s", kind, answer)

        controller.process.run(loop.call_soon, lambda: loop.create_task(call()))

    def _hosts(self) -> list[str]:
        workers = self._world.ray.actors.workers.values()
        gateways = self._world.gateways
        hosts = [HEAD, *(w.process.host for w in workers), *(g.process.host for g in gateways)]
        return list(dict.fromkeys(hosts))
