"""Creates the sequences of a request, one for each choice. Pure."""

from __future__ import annotations

import math

from workers.requests.request import Request
from workers.requests.sequence import SequenceState
from workers.sampling.grammar import CompiledGrammar, GrammarState


def open_choices(
    request: Request, grammar: CompiledGrammar | None, arrival: int, now: float
) -> dict[SequenceState, GrammarState | None]:
    """Create a sequence for each choice that did not end in an earlier attempt.

    Returns each sequence with its own grammar state (None without a grammar). Only the first
    sequence computes the prompt; the others wait for its blocks. A beam search starts with one
    sequence. ``arrival`` is the request's number in the order of receipt, ``now`` the monotonic
    time. Raises ``RequestError`` if the output of an earlier attempt does not match ``grammar``.
    """
    assert (grammar is None) is (request.params.grammar is None), "compiled before it is added"
    deadline = now + request.deadline_ms / 1000 if request.deadline_ms else math.inf
    first_choice: SequenceState | None = None
    sequences: dict[SequenceState, GrammarState | None] = {}
    is_search = request.params.beams is not None
    choices = {0} if is_search else set(range(request.n)) - set(request.closed_choices)
    for choice in sorted(choices):
        has_output = choice < len(request.output_so_far)
        output = list(request.output_so_far[choice]) if has_output else []
        state = None if grammar is None else grammar.start(output)
        sequence = SequenceState(
            request=request,
            choice=choice,
            arrival=arrival,
            deadline=deadline,
            received=now,
            output=output,
            grammar=state,
            first_choice=first_choice,
        )
        first_choice = first_choice or sequence
        sequences[sequence] = state
    return sequences
