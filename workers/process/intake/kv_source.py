"""Interface of sources of KV blocks outside the pool."""

from __future__ import annotations

from typing import Protocol

from workers.process.intake.intake_request import IntakeRequest


class KvSource(Protocol):
    """Loads KV blocks of requests into the pool while the engine runs others.

    Sources are the tiers of this worker in host memory and on disk, including session copies
    (``KvRestores``), and the other workers (``KvFetches``). All methods are for the engine's
    thread, and none waits.
    """

    @property
    def num_free_jobs(self) -> int:
        """Number of prefixes that the source can load in addition to its current ones."""

    def limit_s(self, num_tokens: int) -> float:
        """Longest useful wait, in seconds, for the blocks of a prompt of ``num_tokens`` tokens."""

    def put(self, waiting: IntakeRequest) -> bool:
        """Start to load blocks of a request; False if the source has none that are worth it."""

    def take(self) -> list[IntakeRequest]:
        """Remove and return the requests whose loads have ended, in the order of their starts."""

    def drop(self, name: str) -> None:
        """Remove a request that waits here."""

    def drop_gateway(self, gateway: str) -> None:
        """Remove the requests of a gateway."""

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until the next deadline of a waiting request, at most ``at_most_s``."""
