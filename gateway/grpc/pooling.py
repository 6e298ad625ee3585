"""Embeddings, classification, scores and inspections over gRPC."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from cluster.core.errors import RequestError
from gateway.calls.gateway import Gateway
from gateway.calls.inspect import MAX_CALL_BYTES, InspectFields, InspectionService
from gateway.calls.pooling import PoolingService, PromptInput, make_pooling_call
from gateway.core.call import GenerateCall
from gateway.core.delta import Usage
from gateway.grpc.call import GrpcCall
from gateway.grpc.convert import input_name, read_set_fields
from gateway.grpc.format import usage_message
from gateway.offload.long_work import copy_numbers
from protos import inference_pb2 as pb
from workers.requests.inspection import NamedArray

PoolingRequest = pb.EmbedRequest | pb.ClassifyRequest | pb.ScoreRequest | pb.InspectRequest
PIECE_BYTES = 1024 * 1024
"""Maximum number of bytes of an array in one message."""


class PoolingProcedures:
    """The methods that read prompts without generating text."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._pooling = PoolingService(gateway)
        self._inspecting = InspectionService(gateway)

    async def Embed(self, request: pb.EmbedRequest, call: GrpcCall) -> pb.EmbedResponse:
        fields = await _fields(request, call)
        prompts = await call.convert(_prompts, request.input, "input")
        pooling = await call.convert(lambda: request.pooling or None)
        found = await self._pooling.embed(prompts, pooling, fields)
        head = self._common_fields(request, call, found.usage)
        call.response_size = sum(vector.nbytes for vector in found.rows)

        def answer() -> pb.EmbedResponse:
            vectors = (
                pb.Embedding(index=index, values=vector.tolist())
                for index, vector in enumerate(found.rows)
            )
            return pb.EmbedResponse(data=vectors, **head)

        return await self._gateway.long_work.run(call.response_size, answer)

    async def Classify(self, request: pb.ClassifyRequest, call: GrpcCall) -> pb.ClassifyResponse:
        fields = await _fields(request, call)
        prompts = await call.convert(_prompts, request.input, "input")
        labels = await call.convert(lambda: tuple(request.labels))
        masks = await call.convert(
            lambda: tuple(copy_numbers(one.mask) for one in request.attention_mask)
        )
        found = await self._pooling.classify(prompts, labels, masks, fields)
        rows = (
            pb.Classification(index=index, **asdict(row)) for index, row in enumerate(found.rows)
        )
        return pb.ClassifyResponse(data=rows, **self._common_fields(request, call, found.usage))

    async def Score(self, request: pb.ScoreRequest, call: GrpcCall) -> pb.ScoreResponse:
        fields = await _fields(request, call)
        queries = await call.convert(_prompts, request.queries, "queries")
        documents = await call.convert(_prompts, request.documents, "documents")
        found = await self._pooling.score(queries, documents, fields)
        rows = (pb.DocumentScore(index=i, score=score) for i, score in enumerate(found.rows))
        return pb.ScoreResponse(data=rows, **self._common_fields(request, call, found.usage))

    async def Inspect(
        self, request: pb.InspectRequest, call: GrpcCall
    ) -> AsyncGenerator[pb.InspectChunk]:
        """Stream internal arrays of the model in pieces."""
        await call.send_id()
        wanted = await _fields(request, call)
        fields = await call.convert(grpc_inspect_fields, request)
        async with self._inspecting.inspect(fields, wanted, MAX_CALL_BYTES) as found:
            for index, arrays in enumerate(found.rows):
                for array in arrays:
                    for piece in _pieces(index, array):
                        yield pb.InspectChunk(piece=piece)
            head = self._common_fields(request, call, found.usage)
            summary = pb.InspectSummary(loss=found.loss, aux_loss=found.aux_loss, **head)
            yield pb.InspectChunk(summary=summary)

    def _common_fields(
        self, request: PoolingRequest, call: GrpcCall, usage: Usage
    ) -> dict[str, Any]:
        """Return the common fields of all responses. Also sends the usage as trailing metadata."""
        call.set_usage(usage)
        name = self._pooling.model_name(request.model)
        return {"model": name, "usage": usage_message(usage)}


def grpc_inspect_fields(request: pb.InspectRequest) -> InspectFields:
    """Convert an ``Inspect`` request. Raises ``RequestError``."""
    places = tuple(request.logits_positions)
    has_count = request.HasField("logits_to_keep")
    if places and has_count:
        name = "logits_positions"
        raise RequestError(f"{name} and logits_to_keep cannot both be set", name)
    labels = tuple(
        copy_numbers(one.values) or tuple(float(number) for number in one.ids)
        for one in request.labels
    )
    if not all(math.isfinite(value) for row in labels for value in row):
        raise RequestError("labels must be finite numbers", "labels")
    return InspectFields(
        token_ids=tuple(copy_numbers(one.ids) for one in request.token_ids),
        outputs=tuple(request.outputs),
        masks=tuple(copy_numbers(one.mask) for one in request.attention_mask),
        logits_to_keep=places or (request.logits_to_keep if has_count else None),
        labels=labels,
    )


def _pieces(index: int, array: NamedArray) -> Iterator[pb.ArrayPiece]:
    """Split an array into pieces. An empty array has one piece."""
    for offset in range(0, max(len(array.data), 1), PIECE_BYTES):
        yield pb.ArrayPiece(
            index=index,
            name=array.name,
            dtype=array.dtype,
            shape=array.shape,
            offset=offset,
            data=array.data[offset : offset + PIECE_BYTES],
        )


async def _fields(request: PoolingRequest, call: GrpcCall) -> GenerateCall:
    """Convert the common fields of a request to a call. Raises ``RequestError``."""
    return call.with_headers(make_pooling_call(**await call.convert(read_set_fields, request)))


def _prompts(inputs: Iterable[pb.Input], field: str) -> tuple[PromptInput, ...]:
    return tuple(
        one.text
        if input_name(one, field, f"{field}: ") == "text"
        else copy_numbers(one.token_ids.ids)
        for one in inputs
    )
