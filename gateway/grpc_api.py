"""The gRPC service ``expertmesh.v1.Inference``: messages in, the same calls to ``Gateway``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from cluster.errors import RequestError
from gateway.convert import (
    PRIORITY_HEADER,
    grpc_chat_input,
    grpc_fields,
    with_header_priority,
)
from gateway.core import Gateway, new_call_id
from gateway.delta import Usage
from gateway.field_checks import check_stream
from gateway.generation import Generation
from gateway.grpc_edge import Context, GrpcEdge
from gateway.grpc_format import GrpcFormat
from gateway.openai_format import collect
from gateway.readings import ReadingOptions
from gateway.readings_grpc import GrpcReadings, ReadingRequest, grpc_options
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceServicer

SERVICE = "expertmesh.v1.Inference"
"""Full name of the service."""

Answer = TypeVar("Answer")


class InferenceService(InferenceServicer):
    """Handlers of all procedures."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._readings = GrpcReadings(gateway)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """The whole answer at once."""

        async def work(request_id: str) -> pb.GenerateResponse:
            with await self._start(request, context) as generation:
                choices = await collect(generation)
                _tell_usage(context, generation.usage)
                formatter = GrpcFormat(generation, self._gateway.tokenizer, request_id)
                return formatter.whole(choices, generation.usage)

        return await self._answer("Generate", context, work, request.request_id)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Tokens as they come."""
        with GrpcEdge(
            self._gateway, SERVICE, "GenerateStream", context, request.request_id
        ) as edge:
            try:
                edge.enter()
                with await self._start(request, context, streams=True) as generation:
                    await edge.tell_id()  # while the engine works at the first token
                    formatter = GrpcFormat(generation, self._gateway.tokenizer, edge.request_id)
                    while deltas := await generation.next():
                        for delta in deltas:
                            yield formatter.chunk(delta)
                        generation.sent()
                    _tell_usage(context, generation.usage)
            except Exception as err:
                await edge.abort(err)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Text or a conversation to token ids."""

        async def work(request_id: str) -> pb.TokenizeResponse:
            gateway = self._gateway
            gateway.check_model(request.model or None)
            wanted = request.add_special_tokens if request.HasField("add_special_tokens") else None
            source = request.WhichOneof("input")
            if source is None:
                message = "one of prompt and messages is required"
                raise RequestError(message, "prompt", "missing_required_parameter")
            if source == "messages":
                rendered = await gateway.prompts.render(grpc_chat_input(request.messages))
                ids = await gateway.prompts.encode(rendered.text, bool(wanted))
            else:
                ids = await gateway.prompts.encode(request.prompt, wanted is not False)
            tokenizer = gateway.prompts.require_tokenizer("prompt")
            names = [tokenizer.token_text(i) for i in ids] if request.return_token_strs else []
            facts = gateway.facts
            return pb.TokenizeResponse(
                count=len(ids),
                max_model_len=facts.max_model_len if facts else 0,
                tokens=ids,
                token_strs=names,
            )

        return await self._answer("Tokenize", context, work)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Token ids to text."""

        async def work(request_id: str) -> pb.DetokenizeResponse:
            self._gateway.check_model(request.model or None)
            facts = self._gateway.require_facts()
            text = await self._gateway.prompts.decode(tuple(request.tokens), facts)
            return pb.DetokenizeResponse(prompt=text)

        return await self._answer("Detokenize", context, work)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> types_pb2.ModelInfo:
        """The served model."""

        async def work(request_id: str) -> types_pb2.ModelInfo:
            self._gateway.check_model(request.model or None)
            return self._model()

        return await self._answer("GetModelInfo", context, work)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """All models: the one that is served."""

        async def work(request_id: str) -> pb.ListModelsResponse:
            return pb.ListModelsResponse(models=[self._model()])

        return await self._answer("ListModels", context, work)

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """Classes of prompts."""

        async def work(request_id: str) -> pb.ClassifyResponse:
            answer = await self._readings.classify(request, _reading_options(request, context))
            _tell_usage(context, answer.usage)
            return answer

        return await self._answer("Classify", context, work, request.request_id)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Scores of documents."""

        async def work(request_id: str) -> pb.ScoreResponse:
            answer = await self._readings.score(request, _reading_options(request, context))
            _tell_usage(context, answer.usage)
            return answer

        return await self._answer("Score", context, work, request.request_id)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Vectors of prompts."""

        async def work(request_id: str) -> pb.EmbedResponse:
            answer = await self._readings.embed(request, _reading_options(request, context))
            _tell_usage(context, answer.usage)
            return answer

        return await self._answer("Embed", context, work, request.request_id)

    async def Inspect(
        self, request: pb.InspectRequest, context: Context
    ) -> AsyncIterator[pb.InspectChunk]:
        """What goes on inside the model, in chunks."""
        with self._edge("Inspect", context, request.request_id) as edge:
            try:
                await edge.begin()
                options = _reading_options(request, context)
                async with aclosing(self._readings.inspect(request, options)) as chunks:
                    async for chunk in chunks:
                        if chunk.HasField("summary"):
                            _tell_usage(context, chunk.summary.usage)
                        yield chunk
            except Exception as err:
                await edge.abort(err)

    async def _start(
        self, request: pb.GenerateRequest, context: Context, streams: bool = False
    ) -> Generation:
        priority = dict(context.invocation_metadata() or ()).get(PRIORITY_HEADER)
        fields = with_header_priority(
            grpc_fields(request), None if priority is None else str(priority)
        )
        if streams:
            check_stream(fields)
        return await self._gateway.start(fields, new_call_id(fields.kind), context.time_remaining())

    async def _answer(
        self,
        method: str,
        context: Context,
        work: Callable[[str], Awaitable[Answer]],
        wanted_id: str = "",
    ) -> Answer:
        with self._edge(method, context, wanted_id) as edge:
            try:
                await edge.begin()
                return await work(edge.request_id)
            except Exception as err:
                await edge.abort(err)

    def _edge(self, method: str, context: Context, wanted_id: str) -> GrpcEdge:
        return GrpcEdge(self._gateway, SERVICE, method, context, wanted_id)

    def _model(self) -> types_pb2.ModelInfo:
        gateway = self._gateway
        facts, tokenizer = gateway.facts, gateway.tokenizer
        info = types_pb2.ModelInfo(
            id=gateway.model_name,
            owned_by="expertmesh",
            created=gateway.created,
            root=gateway.model_name,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
            has_tools=gateway.prompts.has_tools,
        )
        if facts is not None:
            info.max_model_len = facts.max_model_len
            info.model_type = facts.model_type
            info.dtype = facts.dtype
            info.vocab_size = facts.vocab_size
            info.eos_token_ids.extend(facts.eos_token_ids)
        return info


def _reading_options(request: ReadingRequest, context: Context) -> ReadingOptions:
    metadata = dict(context.invocation_metadata() or ())
    return grpc_options(request, metadata, context.time_remaining())


def _tell_usage(context: Context, usage: Usage | types_pb2.Usage) -> None:
    """Counts as trailing metadata."""
    counts = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
    if usage.cached_tokens is not None:
        counts["cached"] = usage.cached_tokens
    context.set_trailing_metadata(
        tuple((f"x-{name}-tokens", str(count)) for name, count in counts.items())
    )
