"""Connects the beam search of a request with the sequences of its beams.

A beam is a sequence that sends no output to the client before the end of the search. Once the
candidate next tokens of all beams of a request are known, the search selects the continuations. The
first continuation of a beam uses the beam's sequence. Every other continuation is a fork, a new
sequence that shares the KV blocks of its parent. A beam without a continuation ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from workers.beams.search import BeamSearch, EndedBeam
from workers.requests.request import FinishReason, Request, TokenLogprob, TokenOutput
from workers.requests.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class BeamStep:
    """Changes of a request's beams by one step of its beam search."""

    ended: list[SequenceState]
    """Beams without a continuation; at the end of the search, all beams."""
    forks: list[tuple[SequenceState, SequenceState]]
    """New beams as (parent, child) pairs; the parent continues, too."""
    outputs: list[TokenOutput]
    """Outputs for the client, empty before the end of the search; choice 0 is the best."""
    is_over: bool
    """Whether the search has ended."""


@dataclass(slots=True, eq=False)
class BeamGroup:
    """The beams of one request and its beam search. ``beams`` are in order, the best first."""

    request: Request
    search: BeamSearch
    beams: list[SequenceState]
    _candidates: dict[SequenceState, Sequence[TokenLogprob]] = field(default_factory=dict)

    def set_candidates(self, sequence: SequenceState, candidates: Sequence[TokenLogprob]) -> None:
        """Record the candidate next tokens of a beam, which is idle until all beams have some."""
        self._candidates[sequence] = candidates
        sequence.is_idle = True

    @property
    def is_complete(self) -> bool:
        """Whether the candidate next tokens of all beams are known, so that ``advance`` can run."""
        return len(self._candidates) == len(self.beams)

    def advance(self, now: float, eos: Collection[int]) -> BeamStep:
        """Run a step of the search, and append the selected token to each beam that continues.

        ``now``: monotonic time. ``eos``: end-of-sequence tokens of the model.
        """
        continuations = self.search.advance([self._candidates[beam] for beam in self.beams])
        self._candidates.clear()
        parents = [self.beams[one.parent] for one in continuations]
        ended = [beam for beam in self.beams if beam not in parents]
        free_choices = set(range(self.request.n)) - {beam.choice for beam in parents}
        before = {beam: list(beam.output) for beam in parents}
        forks, beams = [], list[SequenceState]()
        for parent, one in zip(parents, continuations, strict=True):
            beam = parent
            if parent in beams:
                beam = _fork(parent, before[parent], free_choices.pop())
                forks.append((parent, beam))
            beam.first_token = now if beam.first_token is None else beam.first_token
            beam.append(one.token)
            beams.append(beam)
        self.beams = beams or self.beams
        outputs = list[TokenOutput]()
        if self.search.is_over:
            best = enumerate(self.search.ended)
            outputs = [self._output(choice, one, now, eos) for choice, one in best]
        return BeamStep(ended, forks, outputs, self.search.is_over)

    def _output(self, choice: int, one: EndedBeam, now: float, eos: Collection[int]) -> TokenOutput:
        params, tokens, lead = self.request.params, one.path.tokens(), self.beams[0]
        last = tokens[-1].token_id
        is_eos = last in eos and not params.ignore_eos
        is_stop = not is_eos and last in params.stop_token_ids
        return TokenOutput(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            choice=choice,
            index=0,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=() if params.logprobs is None else tokens,
            num_cached_tokens=lead.num_cached_tokens,
            finish_reason=FinishReason.STOP if is_eos or is_stop else FinishReason.LENGTH,
            stop_token_id=last if is_stop else None,
            timings=lead.timings(now),
            score=one.score,
        )


def new_group(sequence: SequenceState, eos: Collection[int]) -> BeamGroup | None:
    """Create the group of a request's beams, at first with one sequence.

    Returns None if the request does not use beam search. ``eos``: end-of-sequence tokens.
    """
    request, beams = sequence.request, sequence.params.beams
    if beams is None:
        return None
    search = BeamSearch(
        beams,
        width=request.n,
        max_tokens=request.params.max_tokens,
        ending=frozenset(ending_tokens(request, eos)),
    )
    return BeamGroup(request, search, [sequence])


def ending_tokens(request: Request, eos: Collection[int]) -> tuple[int, ...]:
    """Return the ids of the tokens that end an output of the request, ascending.

    ``eos``: end-of-sequence tokens of the model.
    """
    params = request.params
    tokens = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    return tuple(sorted(tokens))


def _fork(parent: SequenceState, output: list[int], choice: int) -> SequenceState:
    """Create a beam that continues from ``parent``, with the choice number ``choice``.

    ``output``: output of the parent before this search step.
    """
    return replace(
        parent,
        choice=choice,
        output=list(output),
        num_computed=0,
        blocks=[],
        state=None,
        branch=0,
        latest_state=None,
        seat=None,
        is_idle=False,
        first_choice=parent.first_choice or parent,
        block_hashes=list(parent.block_hashes),
        prefills=list(parent.prefills),
        preemptions=list(parent.preemptions),
        prompt_logprobs=[None],
    )
