"""The requests of an engine, from their receipt to the end of their last sequences. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from workers.requests.request import Request
from workers.requests.sequence import SequenceState


class ActiveRequests:
    """Knows which sequences each request has, and which adapters requests use.

    It belongs to the engine's thread; any thread may read ``adapters``.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, list[SequenceState]] = {}
        self._adapter_uses: Counter[str] = Counter()
        """Requests by adapter."""
        self.num_received = 0
        """Requests so far."""

    def __contains__(self, request_id: str) -> bool:
        """Whether a sequence of this request waits or runs."""
        return request_id in self._sequences

    def __iter__(self) -> Iterator[str]:
        """The ids of those that are here now; they may end meanwhile."""
        return iter(tuple(self._sequences))

    def __bool__(self) -> bool:
        return bool(self._sequences)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Keys of adapters that requests have."""
        return tuple(key for key in tuple(self._adapter_uses) if key)

    def enter(self, request: Request, sequences: Sequence[SequenceState]) -> None:
        """A request was received that is not here."""
        self._sequences[request.request_id] = list(sequences)
        self._adapter_uses[request.adapter] += 1
        self.num_received += 1

    def add(self, sequence: SequenceState) -> None:
        """A request that is here has one more sequence."""
        self._sequences[sequence.request.request_id].append(sequence)

    def remove(self, sequence: SequenceState) -> bool:
        """A sequence has ended; returns whether it was the last one of its request."""
        request_id = sequence.request.request_id
        left = self._sequences[request_id]
        left.remove(sequence)
        if left:
            return False
        del self._sequences[request_id]
        self._stop_using(sequence.request.adapter)
        return True

    def sequences(self, request_id: str) -> tuple[SequenceState, ...]:
        """Those of a request that have not ended; none of a request that is not here."""
        return tuple(self._sequences.get(request_id, ()))

    def attempt(self, request_id: str) -> int:
        """Of a request that is here; -1 for any other."""
        known = self._sequences.get(request_id)
        return known[0].request.attempt if known else -1

    def num_tokens(self, request_id: str) -> int:
        """Tokens with the prompt that each choice of a request has at least."""
        return min(s.num_tokens for s in self._sequences[request_id])

    def _stop_using(self, adapter: str) -> None:
        self._adapter_uses[adapter] -= 1
        if not self._adapter_uses[adapter]:
            del self._adapter_uses[adapter]
