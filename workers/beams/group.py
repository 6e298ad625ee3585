"""The beam searches of an engine: which sequences are the beams of a request, and what it found.

A beam is a sequence without an output of its own for the client. Once the candidates of all beams
of a request are known, the search says which go on: the first continuation of a beam stays in its
sequence, every other one is a fork with the KV blocks of its parent, and a beam without a
continuation ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from workers.beams.search import BeamSearch, EndedBeam
from workers.requests.request import FinishReason, Request, TokenLogprob, TokenOutput
from workers.requests.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class BeamStep:
    """What becomes of the beams of a request."""

    ended: list[SequenceState]
    """Beams without a continuation; at the end all."""
    forks: list[tuple[SequenceState, SequenceState]]
    """(parent, child); the parent goes on itself, too."""
    outputs: list[TokenOutput]
    """What the client gets, at the end: choice 0 is the best."""
    is_over: bool
    """The search has ended."""


@dataclass(slots=True, eq=False)
class BeamGroup:
    """The beams of one request, the best first."""

    request: Request
    search: BeamSearch
    beams: list[SequenceState]
    _candidates: dict[SequenceState, Sequence[TokenLogprob]] = field(default_factory=dict)

    def take(self, sequence: SequenceState, candidates: Sequence[TokenLogprob]) -> None:
        """A beam's row was computed: it is idle until those of the others are."""
        self._candidates[sequence] = candidates
        sequence.is_idle = True

    @property
    def is_complete(self) -> bool:
        """The candidates of all beams are known."""
        return len(self._candidates) == len(self.beams)

    def advance(self, now: float, eos: Collection[int]) -> BeamStep:
        """Continue the search. Sequences that go on have their next token then."""
        found = self.search.advance([self._candidates[beam] for beam in self.beams])
        self._candidates.clear()
        parents = [self.beams[one.parent] for one in found]
        ended = [beam for beam in self.beams if beam not in parents]
        places = set(range(self.request.n)) - {beam.choice for beam in parents}
        before = {beam: list(beam.output) for beam in parents}
        forks, beams = [], list[SequenceState]()
        for parent, one in zip(parents, found, strict=True):
            beam = parent
            if parent in beams:
                beam = _fork(parent, before[parent], places.pop())
                forks.append((parent, beam))
            beam.first_token = now if beam.first_token is None else beam.first_token
            beam.append(one.token)
            beams.append(beam)
        self.beams = beams or self.beams
        outputs = list[TokenOutput]()
        if self.search.is_over:
            best = enumerate(self.search.ended)
            outputs = [self._output(place, one, now, eos) for place, one in best]
        return BeamStep(ended, forks, outputs, self.search.is_over)

    def _output(self, place: int, one: EndedBeam, now: float, eos: Collection[int]) -> TokenOutput:
        params, tokens, lead = self.request.params, one.path.tokens(), self.beams[0]
        last = tokens[-1].token_id
        is_eos = last in eos and not params.ignore_eos
        is_stop = not is_eos and last in params.stop_token_ids
        return TokenOutput(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            choice=place,
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
    """The search of a request with its one sequence; None where tokens are drawn."""
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
    """Tokens that end an output, ascending."""
    params = request.params
    found = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    return tuple(sorted(found))


def _fork(parent: SequenceState, output: list[int], choice: int) -> SequenceState:
    """Another sequence with ``output``, what the parent had before its next token."""
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
