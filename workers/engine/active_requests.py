"""The requests of an engine, from arrival to the end of their last sequences. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from workers.requests.request import Request
from workers.requests.sequence import SequenceState


class ActiveRequests:
    """Tracks the sequences of each request of an engine, and the LoRA adapters that requests use.

    Only the engine's thread may use it, except for ``adapters``, which any thread may read.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, list[SequenceState]] = {}
        self._adapter_uses: Counter[str] = Counter()
        """Number of requests by adapter key; requests without an adapter have the key ""."""
        self.num_received = 0
        """Number of requests received since the start of the engine."""

    def __contains__(self, request_id: str) -> bool:
        """Whether a sequence of this request waits or runs."""
        return request_id in self._sequences

    def __iter__(self) -> Iterator[str]:
        """Iterate over a copy of the request ids; requests may end during the iteration."""
        return iter(tuple(self._sequences))

    def __bool__(self) -> bool:
        return bool(self._sequences)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Keys of the LoRA adapters that waiting or running requests use."""
        return tuple(key for key in tuple(self._adapter_uses) if key)

    def add_request(self, request: Request, sequences: Sequence[SequenceState]) -> None:
        """Add a new request with its sequences."""
        self._sequences[request.request_id] = list(sequences)
        self._adapter_uses[request.adapter] += 1
        self.num_received += 1

    def add_sequence(self, sequence: SequenceState) -> None:
        """Add a sequence to a known request."""
        self._sequences[sequence.request.request_id].append(sequence)

    def remove_sequence(self, sequence: SequenceState) -> bool:
        """Remove an ended sequence; return whether its request has no other sequence left."""
        request_id = sequence.request.request_id
        left = self._sequences[request_id]
        left.remove(sequence)
        if left:
            return False
        del self._sequences[request_id]
        self._stop_using(sequence.request.adapter)
        return True

    def sequences(self, request_id: str) -> tuple[SequenceState, ...]:
        """Sequences of a request that have not ended; empty for an unknown request."""
        return tuple(self._sequences.get(request_id, ()))

    def attempt(self, request_id: str) -> int:
        """Attempt number of a request (its number of earlier submissions); -1 if unknown."""
        known = self._sequences.get(request_id)
        return known[0].request.attempt if known else -1

    def num_tokens(self, request_id: str) -> int:
        """Number of prompt and output tokens of the request's shortest choice that has not ended.

        Raises ``KeyError`` for an unknown request.
        """
        return min(s.num_tokens for s in self._sequences[request_id])

    def _stop_using(self, adapter: str) -> None:
        self._adapter_uses[adapter] -= 1
        if not self._adapter_uses[adapter]:
            del self._adapter_uses[adapter]
