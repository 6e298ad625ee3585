"""What both kinds of worker actor share: a runtime, and an end that nobody can miss."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import ray

from workers.runtime import WorkerArgs, WorkerRuntime

logger = logging.getLogger(__name__)

EXIT_CODE = 1
"""Exit code of a worker that could not go on."""


class WorkerActor:
    """Thin Ray shell around a runtime. Everything but start and stop goes over sockets."""

    runtime_class: ClassVar[type[WorkerRuntime]]

    def __init__(
        self,
        config: Mapping[str, Any],
        member: Mapping[str, Any],
        control_address: str,
        extra: Mapping[str, Any],
    ) -> None:
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        args = WorkerArgs.from_plain(config, member, control_address, extra, host)
        self._runtime = self.runtime_class(args, _die)

    def start(self) -> None:
        """Begin to load and to serve; returns at once."""
        self._runtime.start()

    def ping(self) -> str:
        """The worker's name, to show that it lives."""
        return self._runtime.member.name

    def stop(self) -> None:
        """End serving; the process is ended by the caller."""
        self._runtime.stop()


def _die(reason: str) -> None:
    """End the process: peers and Ray must see at once that this worker is gone."""
    logger.error("worker ends: %s", reason)
    os._exit(EXIT_CODE)
