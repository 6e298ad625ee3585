"""Formats running calls as messages of ``expertmesh.v1``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.calls.answer import TextFormat, alternatives, clamp_logprob
from gateway.calls.running_call import RunningCall
from gateway.core.delta import ChoiceDelta, Finish, TokenText, Usage
from gateway.text.tokenizer import Tokenizer
from protos import inference_pb2 as pb
from protos import types_pb2
from workers.requests.request import FinishReason, TokenLogprob

_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}


class GrpcFormat(TextFormat):
    """Formats one running call.

    Args:
        running: the running call.
        tokenizer: decodes tokens; None formats token ids.
        request_id: id of the request.
    """

    def __init__(self, running: RunningCall, tokenizer: Tokenizer | None, request_id: str) -> None:
        super().__init__(running.call, tokenizer)
        self._prompt = running.requests[0].prompt
        self._request_id = request_id

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            request_id=self._request_id,
            model=self.call.model or "",
            choices=[self._choice(choice) for choice in choices],
            usage=usage_message(usage),
            prompt_token_ids=self._prompt_ids(),
            prompt_logprobs=self._prompt_logprobs(choices[0].prompt_logprobs),
        )

    def _choice(self, choice: ChoiceDelta) -> pb.GenerateChoice:
        parsed, is_call = self._parse(choice)
        return pb.GenerateChoice(
            index=choice.index,
            text=parsed.content,
            token_ids=[token.token_id for token in choice.tokens],
            logprobs=self._logprobs((*choice.echo_tokens, *choice.tokens)),
            finish_info=finish_message(choice.finish, is_call),
            tool_calls=[
                types_pb2.ToolCall(
                    id=call.call_id or "", name=call.name or "", arguments=call.arguments
                )
                for call in parsed.merge_calls().calls
            ],
            reasoning=parsed.reasoning,
            beam_score=choice.finish.beam_score if choice.finish else None,
        )

    def chunk(self, delta: ChoiceDelta) -> pb.GenerateChunk:
        parsed, is_call = self._parse(delta)
        return pb.GenerateChunk(
            request_id=self._request_id,
            choice_index=delta.index,
            token_ids=[token.token_id for token in delta.tokens],
            text=parsed.content,
            tool_calls=[
                types_pb2.ToolCallDelta(
                    index=call.index, id=call.call_id, name=call.name, arguments=call.arguments
                )
                for call in parsed.merge_calls().calls
            ],
            reasoning=parsed.reasoning,
            logprobs=self._logprobs((*delta.echo_tokens, *delta.tokens)),
            finish_info=finish_message(delta.finish, is_call),
            prompt_token_ids=self._prompt_ids() if delta.is_first else (),
            cached_tokens=delta.cached_tokens if delta.is_first else None,
            prompt_logprobs=self._prompt_logprobs(
                delta.prompt_logprobs if not delta.index else None
            ),
        )

    def _prompt_ids(self) -> tuple[int, ...]:
        return self._prompt if self.call.return_token_ids else ()

    def _prompt_logprobs(
        self, entries: Sequence[TokenLogprob | None] | None
    ) -> list[types_pb2.TokenLogprob]:
        wanted = self.call.prompt_logprobs
        if wanted is None or entries is None:
            return []
        pairs = zip(self._prompt, entries, strict=True)
        return [self._entry(TokenText(token, 0, entry), wanted) for token, entry in pairs]

    def _logprobs(self, tokens: Iterable[TokenText]) -> list[types_pb2.TokenLogprob]:
        wanted = self.call.num_logprobs
        if wanted is None:
            return []
        return [self._entry(token, wanted) for token in tokens]

    def _entry(self, token: TokenText, wanted: int) -> types_pb2.TokenLogprob:
        entry = token.logprob
        return types_pb2.TokenLogprob(
            token_id=token.token_id,
            token=self._name(token.token_id),
            logprob=None if entry is None else clamp_logprob(entry.logprob),
            bytes=self._bytes(token.token_id),
            top_logprobs=() if entry is None else self._top(entry, wanted),
            text_offset=token.text_offset,
            rank=0 if entry is None else entry.rank,
        )

    def _top(self, entry: TokenLogprob, wanted: int) -> list[types_pb2.TopLogprob]:
        return [
            types_pb2.TopLogprob(
                token_id=token_id,
                token=self._name(token_id),
                logprob=clamp_logprob(logprob),
                bytes=self._bytes(token_id),
            )
            for token_id, logprob in alternatives(entry, wanted)
        ]


def usage_message(usage: Usage) -> types_pb2.Usage:
    """Format the usage of a call or of one choice."""
    return types_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens or 0,
    )


def finish_message(finish: Finish | None, is_call: bool = False) -> types_pb2.FinishInfo | None:
    """Format the end of a choice; None while it runs."""
    if finish is None:
        return None
    message = types_pb2.FinishInfo(
        reason=_REASONS[finish.reason], usage=usage_message(finish.usage)
    )
    if is_call and finish.reason is FinishReason.STOP:
        message.reason = types_pb2.FINISH_REASON_TOOL_CALLS
    if isinstance(finish.stop_reason, str):
        message.stop = finish.stop_reason
    elif finish.stop_reason is not None:
        message.stop_token_id = finish.stop_reason
    if finish.timings is not None:
        message.timings.first_dispatch_s = finish.timings.first_dispatch_s
        message.timings.first_token_s = finish.timings.first_token_s
        message.timings.finished_s = finish.timings.finished_s
    return message
