"""Admission: bounds on requests and tokens, and retry times for refused requests.

Pure apart from its own counters; the time is passed in.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from cluster.core.errors import QueueFullError
from gateway.core.errors import clamp_retry_s

_RATE_WINDOW = 64
"""Finished requests over which the drain rate is measured."""
_LEAST_FINISHED = 8
"""Finished requests below which the rate is unknown."""
_UNKNOWN_RATE_RETRY_S = 5.0
"""Before the first request has finished."""


@dataclass(slots=True)
class Ticket:
    """A place in the queue; give it back with ``release``, more than once does no harm."""

    admission: Admission
    num_requests: int
    num_tokens: int
    since_s: float
    num_bytes: int = 0
    tenant: str = ""
    is_held: bool = True

    def retry_after_s(self) -> float:
        """Estimated time until there is room for another call of this size."""
        return self.admission.retry_after_s(self.num_requests)

    def release(self, now_s: float) -> None:
        if self.is_held:
            self.is_held = False
            self.admission._release(self, now_s)


@dataclass(eq=False)
class Admission:
    """Counts what a replica holds."""

    max_requests: int
    """Engine requests (one per prompt) held at once."""
    max_tokens: int
    """Prompt and output tokens that they may need together."""
    capacity: int = 0
    """Requests that the engines run at once; more of them wait. The drain rate is measured only
    while some wait or the queue is full: at other times requests leave as fast as they come."""
    max_prompt_bytes: int = 256 * 1024 * 1024
    """Bytes of prompts that are embeddings, held at once."""
    num_requests: int = 0
    num_tokens: int = 0
    """Tokens that they may need."""
    num_bytes: int = 0
    """Bytes of their prompts that are embeddings."""

    def __post_init__(self) -> None:
        self._by_tenant: Counter[str] = Counter()  # requests held
        self._tokens_by_tenant: Counter[str] = Counter()  # that they may need
        self._saturated_s = 0.0  # time with requests waiting or a full queue, in all
        self._since_s: float | None = None  # start of the present such time
        self._finished_s: deque[float] = deque(maxlen=_RATE_WINDOW)  # on the saturated clock
        self._held_s: deque[float] = deque(maxlen=_RATE_WINDOW)  # by finished request

    @property
    def num_waiting(self) -> int:
        """Requests beyond what the engines run at once."""
        return max(0, self.num_requests - self.capacity)

    def admit(
        self,
        num_requests: int,
        num_tokens: int,
        now_s: float,
        num_bytes: int = 0,
        tenant: str = "",
    ) -> Ticket:
        """Take a place for one call. Raises ``QueueFullError`` with a retry time.

        A full queue still takes a call of a tenant with at most half of its equal share.
        """
        has_share = self._has_share(tenant, num_requests, num_tokens)
        over = self.num_requests + num_requests - self.max_requests
        if over > 0 and not has_share:
            raise QueueFullError(
                f"the queue is full: {self.num_requests} requests, at most {self.max_requests} "
                "(max_queue)",
                self.retry_after_s(over),
            )
        is_long = self.num_tokens + num_tokens > self.max_tokens
        if self.num_requests and is_long and not has_share:
            raise QueueFullError(
                f"the queue is full: {self.num_tokens} tokens, and this request needs {num_tokens} "
                f"more, at most {self.max_tokens} (max_queue_tokens)",
                self.retry_after_s(1),
                "queue_tokens",
            )
        if self.num_bytes and self.num_bytes + num_bytes > self.max_prompt_bytes and num_bytes:
            raise QueueFullError(
                f"the queue is full: {self.num_bytes} bytes of embeddings, and this request needs "
                f"{num_bytes} more, at most {self.max_prompt_bytes}",
                self.retry_after_s(1),
            )
        self._add(num_requests, num_tokens, num_bytes, now_s)
        self._by_tenant[tenant] += num_requests
        self._tokens_by_tenant[tenant] += num_tokens
        return Ticket(self, num_requests, num_tokens, now_s, num_bytes, tenant)

    def _has_share(self, tenant: str, num_requests: int, num_tokens: int) -> bool:
        """With these it holds at most half of an equal share of the queue, which then exceeds its
        limits by at most half.
        """
        others = self._by_tenant.keys() - {tenant}
        part = 0.5 / (len(others) + 1)
        return (
            bool(others)
            and self._by_tenant[tenant] + num_requests <= part * self.max_requests
            and self._tokens_by_tenant[tenant] + num_tokens <= part * self.max_tokens
            and self.num_requests + num_requests <= 1.5 * self.max_requests
            and self.num_tokens + num_tokens <= 1.5 * self.max_tokens
        )

    def retry_after_s(self, num_requests: int) -> float:
        """Estimated time until ``num_requests`` have left."""
        rate = self._drain_rate() or self._usual_rate()
        return clamp_retry_s(num_requests / rate if rate else _UNKNOWN_RATE_RETRY_S)

    def queue_time_s(self) -> float:
        """Time until a new request would run; 0 while it is not known."""
        rate = self._drain_rate()
        return self.num_waiting / rate if rate else 0.0

    def _drain_rate(self) -> float | None:
        """Requests finished per second while saturated; None while that is not known."""
        if len(self._finished_s) < _LEAST_FINISHED:
            return None
        span_s = self._finished_s[-1] - self._finished_s[0]
        return (len(self._finished_s) - 1) / span_s if span_s > 0 else None

    def _usual_rate(self) -> float | None:
        """Requests finished per second if those held now take as long as others before did."""
        held_s = sum(self._held_s)
        return self.num_requests * len(self._held_s) / held_s if held_s > 0 else None

    def _release(self, ticket: Ticket, now_s: float) -> None:
        self._held_s.extend([now_s - ticket.since_s] * ticket.num_requests)
        was_saturated = self._since_s is not None
        self._by_tenant[ticket.tenant] -= ticket.num_requests
        self._tokens_by_tenant[ticket.tenant] -= ticket.num_tokens
        if not self._by_tenant[ticket.tenant]:
            del self._by_tenant[ticket.tenant], self._tokens_by_tenant[ticket.tenant]
        self._add(-ticket.num_requests, -ticket.num_tokens, -ticket.num_bytes, now_s)
        if was_saturated:
            self._finished_s.extend([self._saturated_s] * ticket.num_requests)

    def _add(self, num_requests: int, num_tokens: int, num_bytes: int, now_s: float) -> None:
        if self._since_s is not None:
            self._saturated_s += now_s - self._since_s
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        is_full = self.num_requests >= self.max_requests
        self._since_s = now_s if self.num_waiting or is_full else None
