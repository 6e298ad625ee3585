"""Planted bugs: each removes one guard of the product, and the simulation must find it.

python -m tests.simulation --bug early_run
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from msgspec.structs import replace

from cluster.controller.cluster import Cluster
from cluster.controller.epoch_change import EpochChange
from cluster.controller.expert_load_commands import ExpertLoadCommands
from cluster.controller.failover import CollectedState
from cluster.controller.failure_detector import FailureDetector
from cluster.controller.recovery import Recovery
from cluster.controller.workers import WorkerTable
from cluster.core.frames import ExpertsLoaded
from cluster.core.placement import ExpertPlacement
from gateway.calls.admission import Ticket
from gateway.engines import engine_client
from gateway.engines.engine_client import EngineClient
from gateway.engines.engine_pool import EnginePool
from gateway.engines.request_mover import RequestMover
from gateway.engines.submission import Submission
from tests.simulation.disk import SimReader
from tests.simulation.feature_bugs import FEATURE_BUGS
from tests.simulation.planted import MANY, Bug
from tests.simulation.ray import SimGroup
from workers.engine.isolation import Isolation
from workers.experts.transfer.loading import ExpertLoader
from workers.kv import prefix_cache
from workers.kv.transfer.store import KvTransferStore
from workers.model.loading.mapped import MappedFiles
from workers.process.worker.control_side import ControlSide
from workers.requests import block_hash
from workers.requests.block_hash import chain_hash, root_hash
from workers.scheduling.scheduler import Scheduler


def _no_resubmission() -> AbstractContextManager[object]:
    """The requests of a lost stream are forgotten."""
    return mock.patch.object(EngineClient, "take_submissions", return_value=[])


@contextmanager
def _twice_told() -> Iterator[None]:
    """A request is sent again without its output, and the gateway delivers that again."""
    real = Submission.message

    def message(self: Submission, now_s: float) -> Any:
        return replace(real(self, now_s), output_so_far=())

    uncut = mock.patch.object(engine_client, "without_first", new=_as_it_is)
    with uncut, mock.patch.object(Submission, "message", message):
        yield


def _as_it_is(output: Any, count: int) -> Any:
    return output


def _half_step() -> AbstractContextManager[object]:
    """A step that was given up counts as computed."""

    def abandon(self: Scheduler, plan: Any) -> None:
        for planned in plan.rows:
            last = planned.first + planned.count
            planned.sequence.num_computed = min(last, planned.sequence.num_tokens - 1)

    return mock.patch.object(Scheduler, "abandon", abandon)


@contextmanager
def _early_run() -> Iterator[None]:
    """A generation runs although its experts are still being loaded, and nobody compares."""
    unchecked = mock.patch.object(ExpertPlacement, "missing", return_value=())
    with unchecked, mock.patch.object(ExpertLoadCommands, "is_pending", new=False):
        yield


@contextmanager
def _blind_reload() -> Iterator[None]:
    """A file is read again without a look whether it is still the same."""

    def reader(self: MappedFiles, file: Any) -> Any:
        if file not in self._readers:
            self._readers[file] = SimReader(file), (0, 0)
        return self._readers[file][0]

    with mock.patch.object(MappedFiles, "_reader", reader), _torn_read():
        yield


def _torn_read() -> AbstractContextManager[object]:
    """Nobody looks whether a file was written while it was read."""
    return mock.patch.object(MappedFiles, "confirm", return_value=None)


@contextmanager
def _kept_slots() -> Iterator[None]:
    """What the others held before a worker joined counts as held once it runs with them, and
    loaders free slots that are in force again.
    """
    real = Cluster.run

    def run(self: Cluster, now: float) -> bool:
        formed, kept = self.round, (self.round.joins, self.round.before)
        runs = real(self, now)
        formed.joins, formed.before = kept
        return runs

    unguarded = mock.patch.object(ExpertLoader, "_is_needed", return_value=False)
    with unguarded, mock.patch.object(Cluster, "run", run):
        yield


@contextmanager
def _overtaken_order() -> Iterator[None]:
    """A worker that refuses a load order which newer maps have overtaken cannot load."""
    real = Recovery.loaded

    def loaded(self: Recovery, name: str, frame: ExpertsLoaded, now: float) -> bool:
        if frame.error and (order := self.reloads.answered(name, frame.order)) is not None:
            self._cannot_load(order, frame.error, now)
            return True
        return real(self, name, frame, now)

    with mock.patch.object(Recovery, "loaded", loaded):
        yield


def _no_credit() -> AbstractContextManager[object]:
    """The controller blames workers for a pause of its own."""

    def credit(self: FailureDetector, now: float) -> None:
        self.last_tick = now

    return mock.patch.object(FailureDetector, "credit_own_pause", credit)


def _no_hold() -> AbstractContextManager[object]:
    """A blip at the controller's host is taken for the end of all workers."""
    return mock.patch.object(FailureDetector, "end_hold", return_value="")


def _hasty_successor() -> AbstractContextManager[object]:
    """A restarted controller takes the workers for lost that it cannot reach."""
    return mock.patch.object(CollectedState, "silent_members", return_value=frozenset())


def _hasty_belief() -> AbstractContextManager[object]:
    """Reports that were made in a pause of the controller are believed after it."""
    return mock.patch.object(FailureDetector, "void_reports", return_value="")


def _other_build() -> AbstractContextManager[object]:
    """Workers with other data register, and meet the others."""
    return mock.patch.object(WorkerTable, "incompatibility", return_value=None)


@contextmanager
def _early_switch() -> Iterator[None]:
    """Steps switch to a new placement before every worker knows it."""
    real = EpochChange._prepare

    def prepare(self: EpochChange) -> None:
        real(self)
        self._switch()

    with mock.patch.object(EpochChange, "_prepare", prepare):
        yield


@contextmanager
def _short_names() -> Iterator[None]:
    """A cached block is named by its first token and what stands before it."""
    real = chain_hash
    with ExitStack() as held:
        for module in (block_hash, prefix_cache):
            short = mock.patch.object(module, "chain_hash", lambda p, ids: real(p, ids[:1]))
            held.enter_context(short)
        yield


def _no_retry() -> AbstractContextManager[object]:
    """Requests that wait for a worker stay where they are when a stream opens."""

    async def announce(self: EnginePool, client: EngineClient) -> None:
        await client.stream.connected.wait()
        self._notify()

    return mock.patch.object(EnginePool, "_notify_when_connected", announce)


def _one_tenant() -> AbstractContextManager[object]:
    """The names of cached blocks do not depend on the tenant."""
    real = root_hash
    return mock.patch.object(block_hash, "root_hash", lambda salt, *more: real("", *more))


@contextmanager
def _stale_end() -> Iterator[None]:
    """A superseded controller may end processes."""

    async def check(self: SimGroup) -> None:
        pass

    unguarded = mock.patch.object(ControlSide, "check_term", return_value=None)
    alive = mock.patch.object(SimGroup, "end_this_process", return_value=None)
    with unguarded, alive, mock.patch.object(SimGroup, "check_term", check):
        yield


def _kept_loan() -> AbstractContextManager[object]:
    """Blocks that another worker has copied stay held."""
    return mock.patch.object(KvTransferStore, "release", return_value=None)


@contextmanager
def _kept_place() -> Iterator[None]:
    """A call without a token keeps its place in the gateway's queue."""
    real = Ticket.release

    def release(self: Ticket, now_s: float, was_served: bool = True) -> None:
        if was_served:
            real(self, now_s, was_served)

    with mock.patch.object(Ticket, "release", release):
        yield


def _kept_suspect() -> AbstractContextManager[object]:
    """A request that ends stays the likely cause of deaths."""
    return mock.patch.object(Isolation, "forget", return_value=None)


def _kept_move() -> AbstractContextManager[object]:
    """A request that has left its worker still counts as one that moves."""
    return mock.patch.object(RequestMover, "_forget", return_value=None)


BUGS: dict[str, Bug] = {
    "blind_reload": Bug(_blind_reload, ("change_file", "kill_worker")),
    "early_run": Bug(_early_run, ("kill_worker",)),
    "early_switch": Bug(_early_switch, ("rebalance", "slow_link"), MANY),
    "half_step": Bug(_half_step, ("kill_worker",)),
    "kept_slots": Bug(_kept_slots, ("kill_again",)),
    "hasty_belief": Bug(_hasty_belief, ("isolate_head", "pause_controller"), MANY),
    "hasty_successor": Bug(_hasty_successor, ("isolate_restart",)),
    "kept_loan": Bug(_kept_loan, ("kill_worker",)),
    "kept_move": Bug(_kept_move, ("drain_worker",)),
    "kept_place": Bug(_kept_place, ("kill_attention",)),
    "kept_suspect": Bug(_kept_suspect, ("kill_worker",)),
    "no_credit": Bug(_no_credit, ("pause_host",), MANY),
    "no_hold": Bug(_no_hold, ("isolate_head",)),
    "no_resubmission": Bug(_no_resubmission, ("kill_worker",)),
    "no_retry": Bug(_no_retry, ("kill_attention",)),
    "other_build": Bug(_other_build, ("change_file", "kill_attention", "kill_two_workers"), MANY),
    "overtaken_order": Bug(_overtaken_order, ("kill_two_workers",), MANY),
    "short_names": Bug(_short_names, ("kill_worker",)),
    "one_tenant": Bug(_one_tenant, ("kill_worker",)),
    "stale_end": Bug(_stale_end, ("freeze_controller",)),
    "torn_read": Bug(_torn_read, ("change_file", "kill_worker")),
    "twice_told": Bug(_twice_told, ("kill_worker",)),
    **FEATURE_BUGS,
}
"""By name."""
