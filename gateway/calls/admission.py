"""Admission: limits on requests, tokens and waiting times, and retry times of refused requests.

``Admission`` has no state except its counters; callers pass the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.errors import QueueFullError
from gateway.calls.service_rate import ServiceRate
from gateway.calls.tenant_queues import CallDemand, TenantQueues
from gateway.core.errors import clamp_retry_s

_UNKNOWN_RATE_RETRY_S = 5.0
"""Retry time, in seconds, of refused requests before the first request has finished."""
_BURST_S = 1.0
"""Seconds for which a new queue admits requests regardless of their expected wait, so that requests
that arrive together wait instead of being refused."""
_OVERLOAD_SHARE = 1 / 3
"""Fraction of ``max_wait_s`` that limits the expected wait once a queue is older than
``max_wait_s``. Such a queue is not a burst but overload: a long queue then serves no more requests
than a short queue and delays all of them. After Nichols and Jacobson, Controlling Queue Delay (ACM
Queue, 2012), and Maurer, Fail at Scale (ACM Queue, 2015)."""


@dataclass(slots=True)
class Ticket:
    """Entry of an admitted call in the queue of the gateway; ``release`` removes it, once."""

    admission: Admission
    demand: CallDemand
    since_s: float
    is_held: bool = True

    def retry_after_s(self) -> float:
        """Return the estimated seconds until another call of the same size can be admitted."""
        return self.admission.retry_after_s(self.demand.num_requests)

    def release(self, now_s: float, was_served: bool = True) -> None:
        """Remove the call from the queue; later calls of ``release`` have no effect.

        ``was_served``: whether the call used the engines, so that it counts for the service rate.
        """
        if self.is_held:
            self.is_held = False
            self.admission._release(self, now_s, was_served)


@dataclass(eq=False)
class Admission:
    """Counts the admitted requests of a gateway replica, and refuses calls above the limits."""

    max_requests: int
    """Maximum number of admitted engine requests (one per prompt)."""
    max_tokens: int
    """Maximum number of tokens (prompt and output) that all admitted requests may need together."""
    capacity: int = 0
    """Number of choices (sequences) that the engines run at a time; further choices wait. The
    service rate is measured only while choices wait or the queue is full; otherwise requests
    finish at the rate at which they arrive."""
    max_wait_s: float = float("inf")
    """Expected wait, in seconds, above which requests are refused. Once a queue is older than this
    value, a third of it is the limit. Requests with a priority above 0 are not limited."""
    max_prompt_bytes: int = 256 * 1024 * 1024
    """Maximum number of bytes of all admitted prompt embeddings."""
    num_requests: int = field(default=0, init=False)
    num_seats: int = field(default=0, init=False)
    """Number of choices (sequences) that run at the engines or wait for the engines."""
    num_tokens: int = field(default=0, init=False)
    """Number of tokens (prompt and output) that the admitted requests may need."""
    num_bytes: int = field(default=0, init=False)
    """Bytes of prompt embeddings of the admitted requests."""

    def __post_init__(self) -> None:
        self._queues = TenantQueues()
        self._rate = ServiceRate()

    @property
    def num_waiting(self) -> int:
        """Number of choices (sequences) that wait, because the engines run ``capacity`` of them."""
        return max(0, self.num_seats - self.capacity)

    def admit(self, demand: CallDemand, now_s: float) -> Ticket:
        """Admit one call; return its entry in the queue. Raises ``QueueFullError`` with retry time.

        A full queue still admits a call of a tenant that then uses at most half of an equal share.
        """
        self.check(demand, now_s)
        self._add(demand, 1, now_s)
        return Ticket(self, demand, now_s)

    def check(self, demand: CallDemand, now_s: float) -> None:
        """Raise ``QueueFullError`` if ``admit`` would refuse a call with this demand.

        Before tokenization, callers pass the smallest possible demand.
        """
        over = self.num_requests + demand.num_requests - self.max_requests
        if over > 0 and not self._has_share(demand):
            raise QueueFullError(
                f"the queue is full: {self.num_requests} requests, at most {self.max_requests} "
                "(max_queue)",
                self.retry_after_s(over),
            )
        is_long = self.num_tokens + demand.num_tokens > self.max_tokens
        if self.num_requests and is_long and not self._has_share(demand):
            raise QueueFullError(
                f"the queue is full: {self.num_tokens} tokens, and this request needs "
                f"{demand.num_tokens} more, at most {self.max_tokens} (max_queue_tokens)",
                self._tokens_retry_s(self.num_tokens + demand.num_tokens - self.max_tokens),
                "queue_tokens",
            )
        num_bytes = self.num_bytes + demand.num_bytes
        is_big = self.num_bytes and demand.num_bytes and num_bytes > self.max_prompt_bytes
        if is_big and not self._has_share(demand):
            raise QueueFullError(
                f"the queue is full: {self.num_bytes} bytes of embeddings, and this request needs "
                f"{demand.num_bytes} more, at most {self.max_prompt_bytes}",
                self.retry_after_s(1),
            )
        self._check_wait(demand, now_s)

    def _check_wait(self, demand: CallDemand, now_s: float) -> None:
        wait_s = self.queue_time_s(demand)
        is_burst = self._rate.saturated_for_s(now_s) <= _BURST_S
        is_overloaded = self._rate.queue_age_s(now_s) > self.max_wait_s
        limit_s = self.max_wait_s * (_OVERLOAD_SHARE if is_overloaded else 1)
        if wait_s <= limit_s or demand.priority > 0 or is_burst:
            return
        raise QueueFullError(
            f"the queue is full: requests would wait {wait_s:.1f} s, at most {limit_s:.3g} s "
            f"({'a third of ' if is_overloaded else ''}max_queue_wait_s)",
            clamp_retry_s(wait_s - limit_s),
            "queue_wait",
        )

    def _has_share(self, demand: CallDemand) -> bool:
        """Return whether even a full queue admits a call.

        With the call, its tenant must use at most half of an equal share, and the queue must exceed
        its limits by at most half. Another tenant must have requests in the queue.
        """
        own = self._queues.total(demand.tenant)
        num_others = len(self._queues) - (demand.tenant in self._queues)
        part = 0.5 / (num_others + 1)
        return (
            num_others > 0
            and own.num_requests + demand.num_requests <= part * self.max_requests
            and own.num_tokens + demand.num_tokens <= part * self.max_tokens
            and own.num_bytes + demand.num_bytes <= part * self.max_prompt_bytes
            and self.num_requests + demand.num_requests <= 1.5 * self.max_requests
            and self.num_tokens + demand.num_tokens <= 1.5 * self.max_tokens
            and self.num_bytes + demand.num_bytes <= 1.5 * self.max_prompt_bytes
        )

    def retry_after_s(self, num_requests: int) -> float:
        """Return the estimated seconds until ``num_requests`` of the requests have finished."""
        rate = self._rate.requests_per_s or self._usual_rate()
        return clamp_retry_s(num_requests / rate if rate else _UNKNOWN_RATE_RETRY_S)

    def _tokens_retry_s(self, num_tokens: int) -> float:
        """Return the estimated seconds until requests with ``num_tokens`` tokens have finished."""
        rate = self._rate.tokens_per_s
        return clamp_retry_s(num_tokens / rate) if rate else self.retry_after_s(1)

    def queue_time_s(self, demand: CallDemand) -> float:
        """Return the estimated seconds until a new request would run; 0 if unknown.

        The estimate is the number of tokens waiting before the request, divided by the measured
        token rate. Before this rate is known, it is extrapolated from times with fewer concurrent
        requests, which overestimates the rate.
        """
        if not self.num_waiting:
            return 0.0
        rate = self._rate.tokens_per_s
        if rate is None:
            rate = self.capacity * (self._rate.tokens_per_seat_s or 0.0)
        if not rate:
            return 0.0
        return self._queues.tokens_ahead(self.capacity, demand.tenant, demand.priority) / rate

    def _usual_rate(self) -> float | None:
        """Return how many requests would end per second if each took as long as earlier requests.

        None if no request has ended yet.
        """
        held_s = self._rate.mean_held_s
        return self.num_requests / held_s if held_s else None

    def _release(self, ticket: Ticket, now_s: float, was_served: bool) -> None:
        demand, was_saturated = ticket.demand, self._rate.is_running
        self._add(demand, -1, now_s)
        if was_served:
            held_s = now_s - ticket.since_s
            self._rate.note(demand, held_s, was_saturated)

    def _add(self, demand: CallDemand, sign: int, now_s: float) -> None:
        self._queues.add(demand, sign)
        self.num_requests += sign * demand.num_requests
        self.num_seats += sign * demand.num_seats
        self.num_tokens += sign * demand.num_tokens
        self.num_bytes += sign * demand.num_bytes
        is_full = self.num_requests >= self.max_requests
        self._rate.advance(now_s, self.num_waiting > 0 or is_full)
