"""Decides when an output is complete. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from workers.requests.request import FinishReason
from workers.requests.sequence import Ending, SequenceState


class StopConditions:
    """Decides whether a sequence ends after its output so far, and why."""

    def __init__(self, eos_token_ids: Iterable[int], max_model_len: int) -> None:
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len

    def ends_with_next(self, sequence: SequenceState) -> bool:
        """Whether the next token, whichever it is, completes the output by its length."""
        num_more = 1 + len(sequence.output)
        is_last = num_more >= sequence.params.max_tokens
        return is_last or sequence.prompt_length + num_more >= self._max_model_len

    def ending(self, sequence: SequenceState) -> Ending | None:
        """Return why the output so far ends the sequence; None if the sequence continues."""
        params, output = sequence.request.params, sequence.output
        length = len(output)
        if output and length >= params.min_tokens:
            if output[-1] in self._eos and not params.ignore_eos:
                return Ending(reason=FinishReason.STOP)
            if output[-1] in params.stop_token_ids:
                return Ending(reason=FinishReason.STOP, stop_token_id=output[-1])
        if sequence.grammar is not None and sequence.grammar.is_complete:
            return Ending(reason=FinishReason.STOP)
        if length >= params.max_tokens or sequence.prompt_length + length >= self._max_model_len:
            return Ending(reason=FinishReason.LENGTH)
        return None
