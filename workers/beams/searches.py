"""Runs the beam searches of an engine's requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from workers.beams.group import BeamGroup, BeamStep, new_group
from workers.requests.request import TokenLogprob, TokenOutput
from workers.requests.sequence import Failure, SequenceState


class BeamSearches:
    """Runs the beam search of each request that uses one.

    A search runs a step whenever all beams of its request have candidate next tokens.
    """

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos = frozenset(eos_token_ids)
        self._groups: dict[str, BeamGroup] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether the request has a running beam search."""
        return request_id in self._groups

    def start(self, sequence: SequenceState) -> None:
        """Start the beam search of a request with its first sequence.

        No effect if the request does not use beam search.
        """
        if (group := new_group(sequence, self._eos)) is not None:
            self._groups[sequence.request.request_id] = group

    def forget(self, request_id: str) -> None:
        """Drop the beam search of a request that has ended. Unknown ids are ignored."""
        self._groups.pop(request_id, None)

    def advance(
        self, sequence: SequenceState, candidates: Sequence[TokenLogprob], now: float
    ) -> BeamStep | None:
        """Record the candidate next tokens of a beam; run a search step once all beams have some.

        Returns the changes of the beams; None if no step ran, or the search has ended because
        another beam failed. ``now``: monotonic time.
        """
        group = self._groups.get(sequence.request.request_id)
        if group is None:
            return None
        group.set_candidates(sequence, candidates)
        if not group.is_complete:
            return None
        step = group.advance(now, self._eos)
        if step.is_over:
            self.forget(sequence.request.request_id)
        return step

    def fail(self, sequence: SequenceState, failure: Failure, now: float) -> list[TokenOutput]:
        """End a search after its beam ``sequence`` has failed: the result would be wrong.

        Returns one error output for each choice; an empty list if the search has already ended.
        """
        group = self._groups.pop(sequence.request.request_id, None)
        if group is None:
            return []
        error = sequence.make_error(failure, now)
        return [replace(error, choice=choice, index=0) for choice in range(group.request.n)]
