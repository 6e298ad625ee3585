"""KV blocks that are not in the pool: who may have them."""

from __future__ import annotations

from typing import Protocol

from workers.process.intake.intake_request import IntakeRequest


class KvSource(Protocol):
    """Brings KV blocks of requests into the pool while the engine runs others.

    Sources are the tiers of this worker in host memory and on disk, to which the copies of sessions
    belong (``KvRestores``), and the other workers (``KvFetches``). All methods belong to the
    engine's thread, and none waits.
    """

    @property
    def num_free_jobs(self) -> int:
        """Further prefixes that it can bring at the same time."""

    def limit_s(self, num_tokens: int) -> float:
        """Longest useful wait for the blocks of a prompt."""

    def put(self, waiting: IntakeRequest) -> bool:
        """Begin to bring blocks of a request; False where it has none that are worth it."""

    def take(self) -> list[IntakeRequest]:
        """Requests for which nothing more comes, in the order in which their waits began."""

    def drop(self, name: str) -> None:
        """Forget a request if it waits here."""

    def drop_gateway(self, gateway: str) -> None:
        """Forget the requests of a gateway."""

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until ``take`` may return a request that is late, if that is sooner."""
