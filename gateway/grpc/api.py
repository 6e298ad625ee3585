"""The methods of ``expertmesh.v1.Inference``, which convert messages and call ``Gateway``.

``gateway.grpc.handlers`` runs each method within a ``GrpcCall``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from itertools import starmap

from google.protobuf.descriptor import ServiceDescriptor

from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway, new_call_id
from gateway.calls.running_call import RunningCall
from gateway.core.field_checks import check_stream
from gateway.grpc.call import GrpcCall
from gateway.grpc.convert import grpc_call, grpc_chat_input, input_name, optional
from gateway.grpc.format import GrpcFormat
from gateway.grpc.pooling import PoolingProcedures
from gateway.offload.long_work import copy_numbers
from protos import inference_pb2 as pb
from protos import types_pb2

NamesModel = pb.TokenizeRequest | pb.DetokenizeRequest | pb.GetModelInfoRequest
SERVICE: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["Inference"]


class InferenceProcedures(PoolingProcedures):
    """Implements all methods of the service, under their names."""

    async def Generate(self, request: pb.GenerateRequest, call: GrpcCall) -> pb.GenerateResponse:
        with await self._start(request, call) as running:
            choices = await collect(running)
            call.set_usage(running.usage)
            formatter = GrpcFormat(running, running.tokenizer, call.request_id)
            call.response_size = sum(choice.size for choice in choices)
            whole = formatter.whole
            long_work = self._gateway.long_work
            return await long_work.run(call.response_size, whole, choices, running.usage)

    async def GenerateStream(
        self, request: pb.GenerateRequest, call: GrpcCall
    ) -> AsyncGenerator[pb.GenerateChunk]:
        with await self._start(request, call, streams=True) as running:
            await call.send_id()  # meanwhile the engine computes the first token
            formatter = GrpcFormat(running, running.tokenizer, call.request_id)
            while deltas := await running.next():
                for delta in deltas:
                    yield formatter.chunk(delta)
                running.mark_sent()
            call.set_usage(running.usage)

    async def Tokenize(self, request: pb.TokenizeRequest, call: GrpcCall) -> pb.TokenizeResponse:
        is_chat = input_name(request, "prompt") == "messages"
        chat = await call.convert(grpc_chat_input, request.messages) if is_chat else None
        special = optional(request, "add_special_tokens")
        text = await call.convert(lambda: request.prompt)
        with await self._using(request, call) as gateway:
            ids = await gateway.prompts.tokenize(text, chat, special)
            tokenizer = gateway.prompts.require_tokenizer("prompt")
            call.response_size = len(ids)

            def answer() -> pb.TokenizeResponse:
                names = [tokenizer.token_text(i) for i in ids] if request.return_token_strs else []
                return pb.TokenizeResponse(
                    count=len(ids),
                    max_model_len=gateway.model.facts.max_model_len if gateway.model.facts else 0,
                    tokens=ids,
                    token_strs=names,
                )

            return await gateway.long_work.run(len(ids), answer)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, call: GrpcCall
    ) -> pb.DetokenizeResponse:
        with await self._using(request, call) as gateway:
            facts = gateway.require_facts()
            tokens = await call.convert(copy_numbers, request.tokens)
            text = await gateway.prompts.decode(tokens, facts)
        return pb.DetokenizeResponse(prompt=text)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, call: GrpcCall
    ) -> types_pb2.ModelInfo:
        with await self._using(request, call) as gateway:
            return _model(request.model or gateway.model.name, gateway)

    async def ListModels(
        self, request: pb.ListModelsRequest, call: GrpcCall
    ) -> pb.ListModelsResponse:
        """Return each served model, followed by its adapters."""
        return pb.ListModelsResponse(models=starmap(_model, self._gateway.shared.models.names()))

    async def _start(
        self, request: pb.GenerateRequest, call: GrpcCall, streams: bool = False
    ) -> RunningCall:
        fields = call.with_headers(await call.convert(grpc_call, request))
        if streams:
            check_stream(fields)
        return await self._gateway.start(fields, new_call_id(fields.kind))

    async def _using(
        self, request: NamesModel, call: GrpcCall
    ) -> contextlib.AbstractContextManager[Gateway]:
        name = await call.convert(lambda: request.model or None)
        return self._gateway.shared.models.using(name)


def _model(name: str, gateway: Gateway) -> types_pb2.ModelInfo:
    facts, tokenizer = gateway.model.facts, gateway.tokenizer
    info = types_pb2.ModelInfo(
        id=name,
        owned_by="expertmesh",
        created=gateway.status.created,
        root=gateway.model.name,
        parent="" if name == gateway.model.name else gateway.model.name,
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
