"""The Ray actors of the three roles. Each one hosts a worker and ends with its process.

On SIGTERM, which the processes of a node receive when the node shuts down, the actor asks the
controller to drain the worker.

Workers are imported in their own process: an actor class is pickled as a reference to its module,
and the launcher and the controller, which import this module, must not import torch.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import ray

from cluster.core.node_labels import NodeLabels
from cluster.core.topology import Role
from cluster.tracing import logs
from workers.transport.nccl_environment import set_nccl_environment

if TYPE_CHECKING:
    from workers.process.worker.worker import OnDeath, Worker
    from workers.process.worker_args import WorkerArgs

logger = logging.getLogger(__name__)

EXIT_CODE = 1
"""Exit code of a worker that failed."""


class WorkerActor:
    """Ray methods to start, find and end a worker; all other communication uses sockets."""

    def __init__(
        self,
        config: Mapping[str, Any],
        member: Mapping[str, Any],
        control_address: str,
        extra: Mapping[str, Any],
    ) -> None:
        set_nccl_environment()
        from workers.process.worker_args import WorkerArgs  # imports torch

        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        here = _with_node_labels(member, host)
        args = WorkerArgs.from_plain(config, here, control_address, extra, host)
        logs.set_up(args.member.name, args.config.observability.log_format)
        self._worker = self._make_worker(args, _die)
        signal.signal(signal.SIGTERM, self._on_sigterm)  # Ray's own handler ends the process

    def _make_worker(self, args: WorkerArgs, on_death: OnDeath) -> Worker:
        """Import and build the worker."""
        from workers.process.worker.worker import Worker

        return Worker(args, on_death)

    def start(self) -> None:
        """Start to load and to serve; returns at once."""
        self._worker.start()

    def ping(self) -> str:
        """The worker's name; a reply shows that the process is alive."""
        return self._worker.member.name

    def describe(self) -> dict[str, Any]:
        """Facts that a restarted controller needs before this worker can connect to it."""
        args = self._worker.args
        facts = {"config": args.config.to_dict(), "num_slots": args.num_slots}
        return {**facts, "has_called": self._worker.control.has_connected}

    def log(self, after: int) -> tuple[int, list[str]]:
        """The newest lines of this process's log; see ``RecentLines.since``."""
        return logs.RECENT_LINES.since(after)

    def redirect(self, control_address: str, term: int, controller: str) -> None:
        """Connect to a restarted controller.

        Raises ``NotReadyError`` before the first connection, and ``SupersededError``.
        """
        self._worker.control.redirect(control_address, term, controller)

    def stop(self, term: int, controller: str) -> None:
        """Stop serving; the caller ends the process. Raises ``SupersededError``."""
        self._worker.control.check_term(term, controller)
        self._worker.stop()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Ask for a drain; if nothing can be drained, or at the second signal, end at once."""
        threading.Thread(target=self._leave, daemon=True).start()  # no lock in a handler

    def _leave(self) -> None:
        if self._worker.control.request_drain(self._worker.lifetime):
            logger.warning("%s got SIGTERM and asks to be drained", self.ping())
        else:
            _die("SIGTERM")


class AttentionWorker(WorkerActor):
    """Serves requests: embeddings, attention, KV cache, router, sampling."""


class ExpertWorker(WorkerActor):
    """Computes its expert slots for the rows that attention workers dispatch."""


class ColocatedWorker(WorkerActor):
    """Serves requests, and computes its expert slots for all ranks."""


ACTOR_CLASSES: Final[Mapping[Role, type[WorkerActor]]] = {
    "attention": AttentionWorker,
    "expert": ExpertWorker,
    "colocated": ColocatedWorker,
}
"""The classes that ``cluster.actors.worker_group.WorkerGroup`` starts, by role."""


def _with_node_labels(member: Mapping[str, Any], host: str) -> dict[str, Any]:
    """A member with the labels of its node, if they were unknown when it was created."""
    if member.get("node"):
        return dict(member)
    labels: Any = ray.get_runtime_context().get_node_labels()
    node = NodeLabels.of(labels, host)
    facts = {"domain": node.domain, "link_class": node.link_class, "speed": node.speed}
    return {**member, **facts}


def _die(reason: str) -> None:
    """End the process, so that peers and Ray notice at once that this worker has ended."""
    logger.error("worker ends: %s", reason)
    os._exit(EXIT_CODE)
