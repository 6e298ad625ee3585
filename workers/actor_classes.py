"""The actor class of every role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cluster.topology import Role
from workers.actor import WorkerActor
from workers.attention_worker import AttentionWorker
from workers.colocated_worker import ColocatedWorker
from workers.expert_worker import ExpertWorker

ACTOR_CLASSES: Final[Mapping[Role, type[WorkerActor]]] = {
    "attention": AttentionWorker,
    "expert": ExpertWorker,
    "colocated": ColocatedWorker,
}
"""What a ``cluster.worker_group.WorkerGroup`` starts."""
