"""How the controller acts: frames to workers, and the start and end of their processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.core.frames import ControlFrame
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Member


class WorkerLink(Protocol):
    """The actions of the controller on workers."""

    def send(self, worker: str, frame: ControlFrame) -> None:
        """Send to one worker; does nothing if it is not connected."""

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        """Start one more worker, in the background; it holds its part of ``placement``."""

    def end_workers(self, workers: Sequence[str]) -> None:
        """End these workers' processes, in the background."""

    def end_all(self) -> None:
        """End every worker in the background, then call ``Controller.all_ended``."""
