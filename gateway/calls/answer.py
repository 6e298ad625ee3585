"""Collects the choices of a running call, and formats tokens and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from gateway.calls.running_call import RunningCall
from gateway.core.call import GenerateCall
from gateway.core.delta import ChoiceDelta, Finish
from gateway.core.tool_use import ToolCallFormat
from gateway.text.harmony.parser import HarmonyParser
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.call_ids import conversation_call_ids
from gateway.text.tool_formats.tool_calls import ParsedPiece
from workers.requests.request import FinishReason, TokenLogprob

MIN_LOGPROB = -9999.0
"""Log-probability in responses that stands for minus infinity, which JSON cannot represent."""


async def collect(running: RunningCall) -> list[ChoiceDelta]:
    """Run a call to its end and return its choices by index, each as one piece.

    If the call samples more choices than it returns (``best_of``), only the best are returned, best
    first. Raises the errors of ``RunningCall.next``.
    """
    pieces: dict[int, list[ChoiceDelta]] = {}
    while deltas := await running.next():
        for delta in deltas:
            pieces.setdefault(delta.index, []).append(delta)
    choices = [_join(pieces[index]) for index in sorted(pieces)]
    call = running.call
    return _keep_best(choices, call) if call.is_ranked else choices


def _join(pieces: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """Join the streamed pieces of one choice into one piece."""
    return replace(
        pieces[0],
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        finish=pieces[-1].finish,
    )


def _is_at_eos(finish: Finish | None) -> bool:
    """Return whether the model ended the text of a choice with an end-of-text token."""
    return finish is not None and finish.reason is FinishReason.STOP and finish.stop_reason is None


def _keep_best(choices: Sequence[ChoiceDelta], call: GenerateCall) -> list[ChoiceDelta]:
    """Return the best choices of each prompt, best first, with new indices.

    Choices are ranked by the score of the beam search, or else by mean log-probability of tokens.
    """
    kept: list[ChoiceDelta] = []
    for _, drawn in groupby(choices, key=lambda choice: choice.prompt_index):
        by_score = sorted(drawn, key=_score, reverse=True)
        kept += by_score[: call.num_returned]
    return [replace(choice, index=index) for index, choice in enumerate(kept)]


def _score(choice: ChoiceDelta) -> float:
    if choice.finish is not None and choice.finish.beam_score is not None:
        return choice.finish.beam_score
    values = [token.logprob.logprob for token in choice.tokens if token.logprob is not None]
    return math.fsum(values) / len(values) if values else 0.0


class TextFormat:
    """Base of response formats: parses a call's text and formats its tokens.

    Args:
        call: the call whose output is formatted.
        tokenizer: decodes tokens; if None, tokens are shown as token ids.
    """

    def __init__(self, call: GenerateCall, tokenizer: Tokenizer | None) -> None:
        self.call = call
        self._tokenizer = tokenizer
        self._parsers: dict[int, AnswerParser | HarmonyParser | None] = {}

    def _parse(self, delta: ChoiceDelta) -> tuple[ParsedPiece, bool]:
        """Parse the next piece of a choice; return it and whether the choice has tool calls yet."""
        if delta.index not in self._parsers:
            self._parsers[delta.index] = self._make_parser()
        parser = self._parsers[delta.index]
        if parser is None:
            return ParsedPiece(delta.text), False
        is_last = delta.finish is not None
        if isinstance(parser, HarmonyParser):
            parsed = parser.feed(delta.text, is_last, ends_with_token=_is_at_eos(delta.finish))
        else:
            parsed = parser.feed(delta.text, is_last)
        return parsed, parser.has_calls

    def _make_parser(self) -> AnswerParser | HarmonyParser | None:
        """Return the parser for the text of one choice; None if the whole text is content."""
        call = self.call
        form, tools = call.tool_format, call.tools
        if form is ToolCallFormat.HARMONY:
            names = [tool.name for tool in tools.allowed] if tools else []
            return HarmonyParser(names, call.open_message)
        has_calls = form is not None and tools is not None
        if not has_calls and call.thinking is None:
            return None
        used = conversation_call_ids(call.chat.messages, form) if has_calls and call.chat else ()
        return AnswerParser(form, tools, call.thinking, used)

    def _text(self, token_id: int) -> str:
        """Return the readable text of a token; ``token_id:123`` without a tokenizer."""
        known = self._tokenizer
        return f"token_id:{token_id}" if known is None else known.token_text(token_id)

    def _name(self, token_id: int) -> str:
        """Return the name of a token in log-probabilities: its text, or ``token_id:123``."""
        by_number = self.call.return_tokens_as_token_ids
        return f"token_id:{token_id}" if by_number else self._text(token_id)

    def _bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of a token; empty without a tokenizer."""
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


def alternatives(entry: TokenLogprob, wanted: int) -> list[tuple[int, float]]:
    """Return (id, log-probability) of the ``wanted`` most probable tokens at a position.

    The prompt token or sampled token of the position is added at the end if it is not among them.
    """
    top = list(zip(entry.top_ids[:wanted], entry.top_logprobs[:wanted], strict=True))
    if all(token_id != entry.token_id for token_id, _ in top):
        top.append((entry.token_id, entry.logprob))
    return top


def clamp_logprob(value: float) -> float:
    """Clamp a log-probability to the range ``MIN_LOGPROB`` to 0; NaN becomes ``MIN_LOGPROB``."""
    return MIN_LOGPROB if math.isnan(value) else min(max(value, MIN_LOGPROB), 0.0)
