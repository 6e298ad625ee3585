"""HTTP endpoints for embeddings, classification, scores and inspection."""

from __future__ import annotations

import asyncio
import base64
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from numpy.typing import NDArray
from starlette.requests import Request

from gateway.calls.answer import clamp_logprob
from gateway.calls.gateway import Gateway
from gateway.calls.inspect import (
    MAX_JSON_BYTES,
    InspectFields,
    InspectionResult,
    InspectionService,
)
from gateway.calls.pooling import PoolingService, as_numpy, make_pooling_call
from gateway.core.bodies import Items
from gateway.core.call import GenerateCall
from gateway.core.delta import Usage
from gateway.core.field_checks import require_one_of
from gateway.core.headers import with_headers
from gateway.http.convert import mask_list, prompt_list, set_fields
from gateway.http.json_output import dump_long
from gateway.http.middleware import CancellableEndpoint, Responder
from gateway.http.openai_format import pooling_usage
from gateway.http.parse import parse_body
from gateway.http.request_body import timeout_header_s
from gateway.http.schema import CallBody, PromptField
from gateway.http.unsupported import check_unsupported
from workers.requests.inspection import NamedArray


class EmbeddingsBody(CallBody):
    """``POST /v1/embeddings``."""

    input: PromptField
    encoding_format: Literal["float", "base64"] | None = None
    pooling: str | None = None


class ClassifyBody(CallBody):
    """``POST /classify``."""

    input: PromptField
    labels: Items[str] | None = None
    attention_mask: Items[int] | Items[Items[int]] | None = None


class ScoreBody(CallBody):
    """``POST /score`` and ``/v1/score``."""

    queries: PromptField | None = None
    documents: PromptField | None = None
    text_1: PromptField | None = None
    text_2: PromptField | None = None


class InspectBody(CallBody):
    """``POST /v1/inspect``."""

    token_ids: Items[int] | Items[Items[int]]
    outputs: Items[str]
    attention_mask: Items[int] | Items[Items[int]] | None = None
    logits_to_keep: int | Items[int] | None = None
    labels: Items[int] | Items[float] | Items[Items[int]] | Items[Items[float]] | None = None


_MAX_LISTED_VALUES = 16_384
"""Maximum number of array elements that one call converts to a list."""
PoolingHandler = Callable[[GenerateCall], Awaitable[bytes]]
"""Serves a parsed body and returns the response as JSON."""


class PoolingEndpoint(CancellableEndpoint[tuple[PoolingHandler, GenerateCall]]):
    """Serves bodies of type ``kind``, for each of which ``prepare`` returns a handler."""

    def __init__(
        self, gateway: Gateway, kind: type[CallBody], prepare: Callable[[Any], PoolingHandler]
    ) -> None:
        super().__init__(gateway)
        self._kind = kind
        self._prepare = prepare

    def _parse(self, request: Request, data: dict[str, Any]) -> tuple[PoolingHandler, GenerateCall]:
        check_unsupported(data, "pooling")
        body = parse_body(self._kind, data)
        call = make_pooling_call(**set_fields(body))
        call = with_headers(call, request.headers, timeout_header_s(request))
        return self._prepare(body), call

    async def _respond(
        self, request: Request, parsed: tuple[PoolingHandler, GenerateCall], responder: Responder
    ) -> None:
        serve, call = parsed
        await responder.json(await serve(call))

    @classmethod
    def by_path(cls, gateway: Gateway) -> dict[str, PoolingEndpoint]:
        service, inspecting = PoolingService(gateway), InspectionService(gateway)
        served: dict[str, tuple[type[CallBody], Callable[[Any], PoolingHandler]]] = {
            "/v1/embeddings": (EmbeddingsBody, partial(_embeddings, service)),
            "/classify": (ClassifyBody, partial(_classify, service)),
            "/score": (ScoreBody, partial(_score, service)),
            "/v1/score": (ScoreBody, partial(_score, service)),
            "/v1/inspect": (InspectBody, partial(_inspect, inspecting, service)),
        }
        return {path: cls(gateway, *one) for path, one in served.items()}


def _inspect(
    inspecting: InspectionService, service: PoolingService, body: InspectBody
) -> PoolingHandler:
    fields, given = _inspect_fields(body), body.model

    async def serve(call: GenerateCall) -> bytes:
        name = service.model_name(given)
        async with inspecting.inspect(fields, call, MAX_JSON_BYTES) as inspected:
            return await asyncio.to_thread(lambda: dump_long(_inspect_answer(inspected, name)))

    return serve


def _embeddings(service: PoolingService, body: EmbeddingsBody) -> PoolingHandler:
    prompts = prompt_list(body.input)

    async def serve(call: GenerateCall) -> bytes:
        result = await service.embed(prompts, body.pooling, call)
        is_text = body.encoding_format == "base64"
        vectors = (
            base64.b64encode(vector.tobytes()).decode() if is_text else vector.tolist()
            for vector in result.rows
        )
        rows = ({"object": "embedding", "embedding": vector} for vector in vectors)
        return await _list_response("embd", rows, body, service, result.usage)

    return serve


def _classify(service: PoolingService, body: ClassifyBody) -> PoolingHandler:
    prompts, masks = prompt_list(body.input), mask_list(body.attention_mask)

    async def serve(call: GenerateCall) -> bytes:
        result = await service.classify(prompts, tuple(body.labels or ()), masks, call)
        return await _list_response(
            "classify", map(asdict, result.rows), body, service, result.usage
        )

    return serve


def _score(service: PoolingService, body: ScoreBody) -> PoolingHandler:
    names = (
        require_one_of(queries=body.queries, text_1=body.text_1),
        require_one_of(documents=body.documents, text_2=body.text_2),
    )
    queries, documents = (prompt_list(getattr(body, name)) for name in names)

    async def serve(call: GenerateCall) -> bytes:
        result = await service.score(queries, documents, call, names)
        rows = [{"object": "score", "score": score} for score in result.rows]
        return await _list_response("score", rows, body, service, result.usage)

    return serve


async def _list_response(
    prefix: str,
    rows: Iterable[dict[str, Any]],
    body: CallBody,
    service: PoolingService,
    usage: Usage,
) -> bytes:
    """Return the JSON of a response with one row per prompt; a thread iterates over ``rows``."""
    model = service.model_name(body.model)

    def write() -> bytes:
        return dump_long(
            {
                "id": f"{prefix}-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": model,
                "data": [{"index": index, **row} for index, row in enumerate(rows)],
                "usage": pooling_usage(usage),
            }
        )

    return await asyncio.to_thread(write)


def _inspect_fields(body: InspectBody) -> InspectFields:
    keep = body.logits_to_keep
    prompts = mask_list(body.token_ids) or ((),)
    return InspectFields(
        token_ids=prompts,
        outputs=tuple(body.outputs),
        masks=mask_list(body.attention_mask),
        logits_to_keep=tuple(keep) if isinstance(keep, list) else keep,
        labels=_label_rows(body.labels or (), prompts),
    )


def _label_rows(
    labels: Sequence[float] | Sequence[Sequence[float]], prompts: Sequence[Sequence[int]]
) -> tuple[tuple[float, ...], ...]:
    """Return labels by prompt. A flat list is for the only prompt, or has one label per prompt."""
    rows = tuple(tuple(one) for one in labels if isinstance(one, Sequence))
    if rows or not labels:
        return rows
    flat = tuple(one for one in labels if isinstance(one, int | float))
    return (flat,) if len(prompts) == 1 else tuple((one,) for one in flat)


def _inspect_answer(inspected: InspectionResult, model: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "id": f"insp-{uuid.uuid4().hex}",
        "object": "inspection",
        "model": model,
        "data": [
            {"index": index, "num_tokens": count, **_row(arrays)}
            for index, (arrays, count) in enumerate(
                zip(inspected.rows, inspected.num_tokens, strict=True)
            )
        ],
        "loss": inspected.loss,
        "usage": pooling_usage(inspected.usage),
    }
    return answer | ({"aux_loss": dict(inspected.aux_loss)} if inspected.aux_loss else {})


def _row(arrays: Sequence[NamedArray]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    routes: dict[str, dict[str, Any]] = {}
    for array in arrays:
        kind, _, bank = array.name.partition(":")
        values = _to_lists(as_numpy(array))
        if kind == "logprobs":
            row[kind] = [None if math.isnan(value) else clamp_logprob(value) for value in values]
        elif kind == "router_logits":
            row.setdefault(kind, []).append({**_bank(bank), "logits": values})
        elif bank:
            routes.setdefault(bank, _bank(bank))[kind] = values
        else:
            row[kind] = values
    return row | ({"routes": list(routes.values())} if routes else {})


def _to_lists(values: NDArray[Any]) -> Any:
    """Convert an array to nested lists, row by row so that other threads can run."""
    is_small = values.ndim < 2 or values.size <= _MAX_LISTED_VALUES
    return values.tolist() if is_small else [_to_lists(row) for row in values]


def _bank(name: str) -> dict[str, Any]:
    bank, _, layer = name.rpartition(":")
    return {"bank": bank, "layer": int(layer)}
