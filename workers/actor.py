"""What both kinds of worker actor share: a runtime, and an end that nobody can miss.

SIGTERM, which a node's processes get when it is to go, asks the controller to drain the worker.

The runtime is imported in the worker's own process: an actor class travels as a reference to its
module, and the launcher and the controller that touch it shall not have to import torch.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from workers.runtime import OnDeath, WorkerRuntime
    from workers.worker_args import WorkerArgs

logger = logging.getLogger(__name__)

EXIT_CODE = 1
"""Exit code of a worker that could not go on."""


class WorkerActor(ABC):
    """Thin Ray shell around a runtime. Everything but start and stop goes over sockets."""

    def __init__(
        self,
        config: Mapping[str, Any],
        member: Mapping[str, Any],
        control_address: str,
        extra: Mapping[str, Any],
    ) -> None:
        from workers.worker_args import WorkerArgs

        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        args = WorkerArgs.from_plain(config, member, control_address, extra, host)
        self._runtime = self._make_runtime(args, _die)
        signal.signal(signal.SIGTERM, self._on_sigterm)  # Ray's own handler ends the process

    @abstractmethod
    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        """Import and build what runs here."""

    def start(self) -> None:
        """Begin to load and to serve; returns at once."""
        self._runtime.start()

    def ping(self) -> str:
        """The worker's name, to show that it lives."""
        return self._runtime.member.name

    def introduce(self) -> dict[str, Any]:
        """What a restarted controller must know before this worker can call it."""
        return self._runtime.args.to_plain()

    def redirect(self, control_address: str) -> None:
        """A restarted controller listens there. Raises ``NotReadyError`` before the first one."""
        self._runtime.redirect(control_address)

    def stop(self) -> None:
        """End serving; the process is ended by the caller."""
        self._runtime.stop()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Be drained first; with nothing to drain, or at the second signal, end at once."""
        threading.Thread(target=self._leave, daemon=True).start()  # no lock in a handler

    def _leave(self) -> None:
        if self._runtime.wish_drain():
            logger.warning("%s got SIGTERM and asks to be drained", self.ping())
        else:
            _die("SIGTERM")


def _die(reason: str) -> None:
    """End the process: peers and Ray must see at once that this worker is gone."""
    logger.error("worker ends: %s", reason)
    os._exit(EXIT_CODE)
