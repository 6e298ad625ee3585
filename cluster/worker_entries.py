"""The worker classes by name: what the controller is given, and unpacks only inside the workers.

An actor class travels as a reference to its module. The real modules import torch, a second and
300 MB in each process that touches them; these import them where the worker really runs.
"""

from __future__ import annotations

from typing import Any


class AttentionWorkerEntry:
    """Becomes ``workers.attention_worker.AttentionWorker`` in the actor's process."""

    def __init__(self, *args: Any) -> None:
        from workers.attention_worker import AttentionWorker

        self._worker = AttentionWorker(*args)

    def start(self) -> None:
        """Begin to load and to serve; returns at once."""
        self._worker.start()

    def ping(self) -> str:
        """The worker's name."""
        return str(self._worker.ping())

    def stop(self) -> None:
        """End serving."""
        self._worker.stop()


class ExpertWorkerEntry:
    """Becomes ``workers.expert_worker.ExpertWorker`` in the actor's process."""

    def __init__(self, *args: Any) -> None:
        from workers.expert_worker import ExpertWorker

        self._worker = ExpertWorker(*args)

    def start(self) -> None:
        """Begin to load and to serve; returns at once."""
        self._worker.start()

    def ping(self) -> str:
        """The worker's name."""
        return str(self._worker.ping())

    def stop(self) -> None:
        """End serving."""
        self._worker.stop()
