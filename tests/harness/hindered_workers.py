"""New workers with something in their way, told by files in the folder of the checkpoint.

    (checkpoint / Hindrance.SLOW_DISK).touch()      workers that start from now on read slowly

Threads and Ray actors alike; workers that serve already are not touched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from cluster.core.errors import CheckpointError
from cluster.core.topology import Member, Role
from workers.process.context import WorkerContext
from workers.process.worker.actor import ACTOR_CLASSES, ExpertWorker, WorkerActor
from workers.process.worker.worker import OnDeath, Worker
from workers.process.worker_args import WorkerArgs

_SLOW_READ_S = 0.1
_LOOK_S = 0.02
_HELD_LIMIT_S = 60.0


class Hindrance(StrEnum):
    """Name of the file, which stands for what is in the way."""

    SLOW_DISK = "slow-disk"
    """Each matrix takes longer to read."""
    BROKEN_DISK = "broken-disk"
    """No matrix can be read."""
    HELD = "held"
    """Weights are read once the file has gone."""
    OTHER_CPU = "other-cpu"
    """It computes in an arithmetic that no other worker has."""


class HinderedExpert(Worker):
    """An expert worker that looks for the files when it starts."""

    def _is(self, hindrance: Hindrance) -> bool:
        return (Path(self.config.model.path) / hindrance).exists()

    def announce(self, context: WorkerContext, member: Member) -> Member:
        member = super().announce(context, member)
        if self._is(Hindrance.OTHER_CPU):
            member = replace(member, offer=replace(member.offer, kernels=("another",)))
        return member

    def load(self, context: WorkerContext) -> dict[str, Any]:
        until = time.monotonic() + _HELD_LIMIT_S
        while self._is(Hindrance.HELD) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        is_slow, is_broken = self._is(Hindrance.SLOW_DISK), self._is(Hindrance.BROKEN_DISK)
        checkpoint = context.model.checkpoint
        borrow = checkpoint.borrow

        def hindered(*arguments: Any) -> Any:
            if is_broken:
                raise CheckpointError("the disk is broken")
            time.sleep(_SLOW_READ_S * is_slow)
            return borrow(*arguments)

        checkpoint.borrow = hindered  # type: ignore[method-assign, assignment]
        return super().load(context)


class HinderedWorker(ExpertWorker):
    """Its actor."""

    def _make_worker(self, args: WorkerArgs, on_death: OnDeath) -> Worker:
        return HinderedExpert(args, on_death)


HINDERED_CLASSES: Final[Mapping[Role, type[WorkerActor]]] = {
    **ACTOR_CLASSES,
    "expert": HinderedWorker,
}
"""For ``RayCluster``."""
