"""Runs the beam searches of an engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from workers.beams.group import BeamGroup, BeamStep, new_group
from workers.requests.request import TokenLogprob, TokenOutput
from workers.requests.sequence import Failure, SequenceState


class BeamSearches:
    """Runs each request's beam search: one step whenever all its beams have candidates."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos = frozenset(eos_token_ids)
        self._groups: dict[str, BeamGroup] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether a request has a running search."""
        return request_id in self._groups

    def start(self, sequence: SequenceState) -> None:
        """Start the search of a request with its first sequence, if the request uses beams."""
        if (group := new_group(sequence, self._eos)) is not None:
            self._groups[sequence.request.request_id] = group

    def forget(self, request_id: str) -> None:
        """Remove an ended request."""
        self._groups.pop(request_id, None)

    def advance(
        self, sequence: SequenceState, candidates: Sequence[TokenLogprob], now: float
    ) -> BeamStep | None:
        """Record the candidates of a beam, and run a step of its search once all beams have some.
        Returns None if no step ran, also after another beam has failed.
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
        """End a search after a beam has failed, as its result would be wrong without that beam.
        Returns the error outputs; none if the search has already ended.
        """
        group = self._groups.pop(sequence.request.request_id, None)
        if group is None:
            return []
        error = sequence.make_error(failure, now)
        return [replace(error, choice=choice, index=0) for choice in range(group.request.n)]
