"""``Request`` and ``StepOutput`` to and from their messages in ``protos/engine.proto``."""

from __future__ import annotations

from protos import engine_pb2 as pb
from workers.inspection import Inspection, NamedArray, Pooling
from workers.prefix_hash import SHORT_BYTES, KvEvents
from workers.prompt_embeds import PromptEmbeds
from workers.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    StepOutput,
    Timings,
    TokenLogprob,
    TokenOutput,
    Turn,
)

_INSIDES = ("hidden_states", "router_logits", "routes", "attentions", "aux")
"""Fields of an inspection that are yes or no."""


def request_to_wire(request: Request) -> pb.EngineRequest:
    """Encode a request."""
    params = request.params
    return pb.EngineRequest(
        request_id=request.request_id,
        prompt=request.prompt,
        sampling=pb.EngineSampling(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            logit_bias=[pb.EngineBias(token_id=t, bias=b) for t, b in params.logit_bias],
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            seed=params.seed,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            logprob_token_ids=params.logprob_token_ids,
            allowed_token_ids=params.allowed_token_ids,
            bad_words=[pb.EngineTokens(ids=ids) for ids in params.bad_words],
            grammar=_grammar_to_wire(params.grammar),
        ),
        n=request.n,
        attempt=request.attempt,
        output_so_far=[pb.EngineTokens(ids=ids) for ids in request.output_so_far],
        closed_choices=request.closed_choices,
        num_deaths=request.num_deaths,
        deadline_ms=request.deadline_ms,
        priority=request.priority,
        cache_salt=request.cache_salt,
        inspection=_inspection_to_wire(request.inspection),
        prompt_embeds=request.prompt_embeds.data if request.prompt_embeds else b"",
        prompt_embeds_width=request.prompt_embeds.width if request.prompt_embeds else 0,
        kv_peer=request.kv_peer,
    )


def request_from_wire(message: pb.EngineRequest) -> Request:
    """Decode a request."""
    sampling = message.sampling
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=tuple((b.token_id, b.bias) for b in sampling.logit_bias),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        seed=sampling.seed,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=(
            sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None
        ),
        logprob_token_ids=tuple(sampling.logprob_token_ids),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        bad_words=tuple(tuple(t.ids) for t in sampling.bad_words),
        grammar=_grammar_from_wire(sampling),
    )
    return Request(
        request_id=message.request_id,
        prompt=tuple(message.prompt),
        params=params,
        n=message.n,
        attempt=message.attempt,
        output_so_far=tuple(tuple(t.ids) for t in message.output_so_far),
        closed_choices=tuple(message.closed_choices),
        num_deaths=message.num_deaths,
        deadline_ms=message.deadline_ms,
        priority=message.priority,
        cache_salt=message.cache_salt,
        inspection=_inspection_from_wire(message),
        prompt_embeds=_embeds_from_wire(message),
        kv_peer=message.kv_peer,
    )


def step_to_wire(step: StepOutput) -> pb.EngineStep:
    """Encode the news of one step."""
    return pb.EngineStep(outputs=[_output_to_wire(o) for o in step.outputs], stats=step.stats)


def step_from_wire(message: pb.EngineStep) -> StepOutput:
    """Decode the news of one step."""
    return StepOutput(
        outputs=tuple(_output_from_wire(o) for o in message.outputs), stats=dict(message.stats)
    )


def turn_to_wire(turn: Turn) -> pb.EngineTurn:
    """Encode a turn."""
    return pb.EngineTurn(request_id=turn.request_id, attempt=turn.attempt, is_over=turn.is_over)


def turn_from_wire(message: pb.EngineTurn) -> Turn:
    """Decode a turn."""
    return Turn(request_id=message.request_id, attempt=message.attempt, is_over=message.is_over)


def kv_events_to_wire(events: KvEvents) -> pb.KvEvents:
    """Encode what is new among a worker's blocks."""
    return pb.KvEvents(
        number=events.number,
        is_whole=events.is_whole,
        stored=b"".join(events.stored),
        removed=b"".join(events.removed),
        fetch_cost=events.fetch_cost,
    )


def kv_events_from_wire(message: pb.KvEvents) -> KvEvents:
    """Decode what is new among a worker's blocks."""
    return KvEvents(
        number=message.number,
        is_whole=message.is_whole,
        stored=_short_hashes(message.stored),
        removed=_short_hashes(message.removed),
        fetch_cost=message.fetch_cost,
    )


def _short_hashes(joined: bytes) -> tuple[bytes, ...]:
    return tuple(joined[i : i + SHORT_BYTES] for i in range(0, len(joined), SHORT_BYTES))


def _embeds_from_wire(message: pb.EngineRequest) -> PromptEmbeds | None:
    width = message.prompt_embeds_width
    return PromptEmbeds(width, message.prompt_embeds) if width else None


def _inspection_to_wire(inspection: Inspection | None) -> pb.EngineInspection | None:
    if inspection is None:
        return None
    pooling = inspection.embedding
    return pb.EngineInspection(
        logits=inspection.logits,
        labels=inspection.labels,
        embedding=pooling.value if pooling else "",
        **{name: getattr(inspection, name) for name in _INSIDES},
    )


def _inspection_from_wire(request: pb.EngineRequest) -> Inspection | None:
    if not request.HasField("inspection"):
        return None
    message = request.inspection
    return Inspection(
        logits=tuple(message.logits),
        labels=tuple(message.labels),
        embedding=Pooling(message.embedding) if message.embedding else None,
        **{name: getattr(message, name) for name in _INSIDES},
    )


def _grammar_to_wire(grammar: Grammar | None) -> pb.EngineGrammar | None:
    if grammar is None:
        return None
    return pb.EngineGrammar(kind=grammar.kind.value, text=grammar.text, field=grammar.field)


def _grammar_from_wire(sampling: pb.EngineSampling) -> Grammar | None:
    if not sampling.HasField("grammar"):
        return None
    message = sampling.grammar
    return Grammar(kind=GrammarKind(message.kind), text=message.text, field=message.field)


def _output_to_wire(output: TokenOutput) -> pb.EngineOutput:
    message = pb.EngineOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        choice=output.choice,
        index=output.index,
        token_ids=output.token_ids,
        logprobs=[_logprob_to_wire(p) for p in output.logprobs],
        finish_reason=output.finish_reason.value if output.finish_reason else "",
        stop_token_id=output.stop_token_id,
        error=output.error or "",
        error_code=output.error_code,
        num_cached_tokens=output.num_cached_tokens,
        error_param=output.error_param or "",
        class_logits=output.class_logits,
        arrays=[
            pb.EngineArray(name=a.name, dtype=a.dtype, shape=a.shape, data=a.data)
            for a in output.arrays
        ],
    )
    if output.prompt_logprobs is not None:
        message.has_prompt_logprobs = True
        message.prompt_logprobs.extend(_logprob_to_wire(p) for p in output.prompt_logprobs)
    if output.timings is not None:
        message.timings.first_dispatch_s = output.timings.first_dispatch_s
        message.timings.first_token_s = output.timings.first_token_s
        message.timings.finished_s = output.timings.finished_s
        message.timings.prefill_s.extend(output.timings.prefill_s)
        message.timings.preempted_s.extend(output.timings.preempted_s)
    return message


def _output_from_wire(message: pb.EngineOutput) -> TokenOutput:
    prompt_logprobs = tuple(_logprob_from_wire(p) for p in message.prompt_logprobs)
    timings = None
    if message.HasField("timings"):
        timings = Timings(
            first_dispatch_s=message.timings.first_dispatch_s,
            first_token_s=message.timings.first_token_s,
            finished_s=message.timings.finished_s,
            prefill_s=tuple(message.timings.prefill_s),
            preempted_s=tuple(message.timings.preempted_s),
        )
    num_cached = message.num_cached_tokens if message.HasField("num_cached_tokens") else None
    return TokenOutput(
        request_id=message.request_id,
        attempt=message.attempt,
        choice=message.choice,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(p for p in map(_logprob_from_wire, message.logprobs) if p is not None),
        prompt_logprobs=prompt_logprobs if message.has_prompt_logprobs else None,
        num_cached_tokens=num_cached,
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=message.error or None,
        error_code=message.error_code,
        error_param=message.error_param or None,
        class_logits=tuple(message.class_logits),
        arrays=tuple(
            NamedArray(name=a.name, dtype=a.dtype, shape=tuple(a.shape), data=a.data)
            for a in message.arrays
        ),
        timings=timings,
    )


def _logprob_to_wire(entry: TokenLogprob | None) -> pb.EngineLogprob:
    if entry is None:
        return pb.EngineLogprob(absent=True)
    return pb.EngineLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def _logprob_from_wire(message: pb.EngineLogprob) -> TokenLogprob | None:
    if message.absent:
        return None
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprob(
        token_id=message.token_id, logprob=message.logprob, rank=message.rank, top=top
    )
