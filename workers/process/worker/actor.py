"""The Ray actors of the three kinds of workers. An actor and its worker share one process.

On SIGTERM, which the processes of a node receive when the node shuts down, the actor asks the
controller to drain the worker.

The actor imports the worker's modules only when it runs, as the launcher and the controller import
this module (Ray pickles an actor class as a reference to its module) and must not import torch.
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
from cluster.core.process import import_at_low_priority
from cluster.core.topology import Role
from cluster.tracing import logs
from workers.transport.nccl_environment import set_nccl_environment

if TYPE_CHECKING:
    from workers.process.worker.worker import OnDeath, Worker
    from workers.process.worker_args import WorkerArgs

logger = logging.getLogger(__name__)

_WORKER_MODULE = "workers.process.worker.worker"
EXIT_CODE = 1
"""Exit code of a worker that failed."""


class WorkerActor:
    """Ray methods to start, describe and stop a worker. All other communication uses sockets."""

    def __init__(
        self,
        config: Mapping[str, Any],
        member: Mapping[str, Any],
        control_address: str,
        extra: Mapping[str, Any],
    ) -> None:
        set_nccl_environment()
        if config["workers"].get("other_pools"):  # other models may serve on this host
            import_at_low_priority(_WORKER_MODULE)
        from workers.process.worker_args import WorkerArgs  # imports torch

        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        here = _with_node_labels(member, host)
        args = WorkerArgs.from_plain(config, here, control_address, extra, host)
        name = args.config.process_name(args.member.name)
        logs.set_up(name, args.config.observability.log_format)
        self._worker = self._make_worker(args, _die)
        signal.signal(signal.SIGTERM, self._on_sigterm)  # Ray's own handler ends the process

    def _make_worker(self, args: WorkerArgs, on_death: OnDeath) -> Worker:
        """Import the worker's modules and create the worker."""
        from workers.process.worker.worker import Worker

        return Worker(args, on_death)

    def start(self) -> None:
        """Start the worker's data thread, which loads weights and then serves. Does not wait."""
        self._worker.start()

    def ping(self) -> str:
        """Return the worker's name; a reply shows that the process is alive."""
        return self._worker.member.name

    def describe(self) -> dict[str, Any]:
        """Return facts that a restarted controller needs before this worker can connect to it."""
        args = self._worker.args
        facts = {"config": args.config.to_dict(), "num_slots": args.num_slots}
        return {**facts, "has_called": self._worker.control.has_connected}

    def log(self, after: int) -> tuple[int, list[str]]:
        """Return the number of log lines of this process, and the newest after line ``after``."""
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
        """Ask for a drain. If that is not possible, or on a second signal, end the process."""
        threading.Thread(target=self._leave, daemon=True).start()  # no lock in a handler

    def _leave(self) -> None:
        if self._worker.control.request_drain(self._worker.lifetime):
            logger.warning("%s got SIGTERM and asks to be drained", self.ping())
        else:
            _die("SIGTERM")


class AttentionWorker(WorkerActor):
    """Serves requests: embeddings, attention, KV cache, expert routing, sampling."""


class ExpertWorker(WorkerActor):
    """Computes the rows that attention workers dispatch, with the experts in its slots."""


class ColocatedWorker(WorkerActor):
    """Serves requests, and computes rows of all attention ranks with its expert slots."""


ACTOR_CLASSES: Final[Mapping[Role, type[WorkerActor]]] = {
    "attention": AttentionWorker,
    "expert": ExpertWorker,
    "colocated": ColocatedWorker,
}
"""The classes that ``cluster.actors.worker_group.WorkerGroup`` starts, by role."""


def _with_node_labels(member: Mapping[str, Any], host: str) -> dict[str, Any]:
    """Add the labels of this node to a member that was created without them."""
    if member.get("node"):
        return dict(member)
    labels: Any = ray.get_runtime_context().get_node_labels()
    node = NodeLabels.of(labels, host)
    facts = {"domain": node.domain, "link_class": node.link_class, "speed": node.speed}
    return {**member, **facts}


def _die(reason: str) -> None:
    """End the process, so that peers and Ray notice the failure at once."""
    logger.error("worker ends: %s", reason)
    os._exit(EXIT_CODE)
