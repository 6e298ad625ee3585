"""Planted bugs: each removes one guard of the product, and the simulation must find it.

python -m tests.simulation --bug stale_frames --seed 0 --num 100
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from msgspec.structs import replace

from cluster.controller.parts.detection import Detection
from cluster.controller.parts.generation_round import GenerationRound
from cluster.controller.parts.reloads import Reloads
from gateway.engines import engine_client
from gateway.engines.engine_client import EngineClient
from gateway.engines.engine_pool import EnginePool
from workers.engine.engine import Engine
from workers.engine.scheduler import Scheduler
from workers.kv import prefix_cache
from workers.kv.block_pool import BlockPool
from workers.process.membership import Membership
from workers.transport.edge_table import EdgeTable

Plant = Callable[[], AbstractContextManager[object]]


def _kept_tokens() -> AbstractContextManager[object]:
    """The gateway does not cut tokens that it has delivered already."""
    return mock.patch.object(engine_client, "without_first", lambda output, count: output)


def _no_resubmission() -> AbstractContextManager[object]:
    """The requests of a lost stream are forgotten."""
    return mock.patch.object(EngineClient, "take_submissions", return_value=[])


def _no_output_so_far() -> AbstractContextManager[object]:
    """A request is sent again without the tokens that its client has."""
    real = EngineClient.submit

    def submit(self: EngineClient, entry: Any) -> None:
        entry.request = replace(entry.request, output_so_far=())
        real(self, entry)

    return mock.patch.object(EngineClient, "submit", submit)


def _no_abandon() -> AbstractContextManager[object]:
    """A step that was given up keeps what its plan has changed."""
    return mock.patch.object(Scheduler, "abandon", return_value=None)


def _half_step() -> AbstractContextManager[object]:
    """A step that was given up counts as committed in the cache."""
    real = Scheduler.abandon

    def abandon(self: Scheduler, plan: Any) -> None:
        real(self, plan)
        for planned in plan.rows:
            sequence = planned.sequence
            if planned.num_new_blocks == 0 and not planned.is_admitted:
                sequence.num_computed = planned.first + planned.count
        for planned in plan.rows:
            sequence = planned.sequence
            sequence.num_computed = min(sequence.num_computed, sequence.num_tokens - 1)

    return mock.patch.object(Scheduler, "abandon", abandon)


def _early_run() -> AbstractContextManager[object]:
    """A generation runs although its experts are still being loaded, and nobody compares."""
    return _both(
        mock.patch.object(Reloads, "is_pending", False),
        mock.patch.object(GenerationRound, "missing", return_value=[]),
    )


def _same_step_numbers() -> AbstractContextManager[object]:
    """A new generation begins at step 1 again."""
    return mock.patch.object(GenerationRound, "first_step", 1)


def _kept_frames() -> AbstractContextManager[object]:
    """What was received in an older generation stays in the inbox."""
    return mock.patch.object(EdgeTable, "_clear_inbox", return_value=None)


def _no_credit() -> AbstractContextManager[object]:
    """The controller blames workers for a pause of its own."""

    def credit(self: Detection, now: float) -> None:
        self.last_tick = now

    return mock.patch.object(Detection, "credit_own_pause", credit)


def _no_hold() -> AbstractContextManager[object]:
    """A blip at the controller's host is taken for the end of all workers."""
    return mock.patch.object(Detection, "end_hold", return_value="")


def _no_stall_reform() -> AbstractContextManager[object]:
    """A worker keeps to itself that it has lost a peer."""

    def lose(self: Membership, err: Any) -> None:
        self.leave()

    return mock.patch.object(Membership, "lose", lose)


def _blocks_of_all() -> AbstractContextManager[object]:
    """A cached block is found by its own tokens alone."""
    return mock.patch.object(
        prefix_cache, "chain_hash", lambda parent, ids: repr(tuple(ids)).encode().ljust(32)
    )


def _reused_blocks() -> AbstractContextManager[object]:
    """A block that is given back can still be found after it was written again."""
    real = BlockPool.allocate

    def allocate(self: BlockPool, count: int) -> list[int]:
        kept = dict(self._by_hash) if hasattr(self, "_by_hash") else {}
        found = real(self, count)
        for name, block in kept.items():
            self._by_hash.setdefault(name, block)
        return found

    return mock.patch.object(BlockPool, "allocate", allocate)


def _twice_aborted() -> AbstractContextManager[object]:
    """The engine takes a newer attempt beside the older one."""
    return mock.patch.object(Engine, "abort", return_value=None)


def _no_retry() -> AbstractContextManager[object]:
    """Requests that wait for a worker are not placed when a stream opens."""

    async def announce(self: EnginePool, client: EngineClient) -> None:
        await client.connected.wait()
        self._notify()

    return mock.patch.object(EnginePool, "_announce", announce)


@contextmanager
def _both(*plants: AbstractContextManager[object]) -> Iterator[None]:
    first, second = plants
    with first, second:
        yield


BUGS: dict[str, Plant] = {
    "kept_tokens": _kept_tokens,
    "no_resubmission": _no_resubmission,
    "no_output_so_far": _no_output_so_far,
    "no_abandon": _no_abandon,
    "half_step": _half_step,
    "early_run": _early_run,
    "same_step_numbers": _same_step_numbers,
    "kept_frames": _kept_frames,
    "no_credit": _no_credit,
    "no_hold": _no_hold,
    "silent_loss": _no_stall_reform,
    "blocks_of_all": _blocks_of_all,
    "reused_blocks": _reused_blocks,
    "kept_requests": _twice_aborted,
    "no_retry": _no_retry,
}
"""By name."""
