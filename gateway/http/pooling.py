"""Embeddings, classification and scores over HTTP."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from starlette.requests import Request

from cluster.core.errors import UnsupportedParameterError
from gateway.core.delta import Usage
from gateway.core.field_checks import given_one
from gateway.core.priority import PRIORITY_HEADER, header_priority
from gateway.generation.gateway import Gateway
from gateway.generation.inspect import MAX_JSON_BYTES, Inspecting
from gateway.generation.pooling import PoolingOptions, Reader
from gateway.http.convert import mask_list, prompt_list
from gateway.http.edge import Responder, WatchedEndpoint, dump_json, timeout_header_s
from gateway.http.inspect import InspectBody, inspect_answer, inspect_fields
from gateway.http.openai_format import pooling_usage
from gateway.http.parse import parse_body
from gateway.http.schema import Items, PoolingBody, PromptField


class EmbeddingsBody(PoolingBody):
    """``POST /v1/embeddings``."""

    input: PromptField
    encoding_format: Literal["float", "base64"] | None = None
    pooling: str | None = None


class ClassifyBody(PoolingBody):
    """``POST /classify``."""

    input: PromptField
    labels: Items[str] | None = None
    attention_mask: Items[int] | Items[Items[int]] | None = None


class ScoreBody(PoolingBody):
    """``POST /score`` and ``/v1/score``."""

    queries: PromptField | None = None
    documents: PromptField | None = None
    text_1: PromptField | None = None
    text_2: PromptField | None = None


REFUSED_FIELDS: Mapping[str, tuple[object, ...]] = {
    "dimensions": (),
    "normalize": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "use_activation": (True,),
    "activation": (True,),
    "messages": (),
    "instruction": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
}
"""Known fields that are not built, each with the values that change nothing."""

Kind = TypeVar("Kind", bound=PoolingBody)
Serve = Callable[[Mapping[str, Any], PoolingOptions], Awaitable[dict[str, Any] | bytes]]
"""Serves one body; ``PoolingOptions`` has what the headers say."""


class PoolingEndpoint(WatchedEndpoint):
    def __init__(self, gateway: Gateway, serve: Serve) -> None:
        super().__init__(gateway)
        self._serve = serve

    async def _answer(self, request: Request, data: dict[str, Any], responder: Responder) -> None:
        options = PoolingOptions(
            priority=header_priority(request.headers.get(PRIORITY_HEADER)),
            timeout_s=timeout_header_s(request),
        )
        await responder.json(await self._serve(data, options))

    @classmethod
    def all(cls, gateway: Gateway) -> dict[str, PoolingEndpoint]:
        served = {
            "/v1/embeddings": _embeddings,
            "/classify": _classify,
            "/score": _score,
            "/v1/score": _score,
        }
        reader = Reader(gateway)
        found = {path: cls(gateway, partial(serve, reader)) for path, serve in served.items()}
        inspect = partial(_inspect, Inspecting(gateway), gateway.model_name)
        return found | {"/v1/inspect": cls(gateway, inspect)}


async def _inspect(
    inspecting: Inspecting, model_name: str, data: Mapping[str, Any], options: PoolingOptions
) -> bytes:
    body, options = parse_pooling(InspectBody, data, options)
    async with inspecting.inspect(inspect_fields(body), options, MAX_JSON_BYTES) as found:
        name = body.model or model_name
        return await asyncio.to_thread(lambda: dump_json(inspect_answer(found, name)))


async def _embeddings(
    reader: Reader, data: Mapping[str, Any], options: PoolingOptions
) -> dict[str, Any]:
    body, options = parse_pooling(EmbeddingsBody, data, options)
    embedded = await reader.embed(prompt_list(body.input), body.pooling, options)
    is_text = body.encoding_format == "base64"
    rows = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.tobytes()).decode()
            if is_text
            else vector.tolist(),
        }
        for index, vector in enumerate(embedded.rows)
    ]
    return _list("embd", rows, body, reader, embedded.usage)


async def _classify(
    reader: Reader, data: Mapping[str, Any], options: PoolingOptions
) -> dict[str, Any]:
    body, options = parse_pooling(ClassifyBody, data, options)
    masks = mask_list(body.attention_mask)
    classified = await reader.classify(
        prompt_list(body.input), tuple(body.labels or ()), masks, options
    )
    rows = [
        {
            "index": index,
            "label": row.label,
            "probs": list(row.probs),
            "logits": list(row.logits),
            "num_classes": len(row.logits),
        }
        for index, row in enumerate(classified.rows)
    ]
    return _list("classify", rows, body, reader, classified.usage)


async def _score(
    reader: Reader, data: Mapping[str, Any], options: PoolingOptions
) -> dict[str, Any]:
    body, options = parse_pooling(ScoreBody, data, options)
    names = (
        given_one(queries=body.queries, text_1=body.text_1),
        given_one(documents=body.documents, text_2=body.text_2),
    )
    queries, documents = (prompt_list(getattr(body, name)) for name in names)
    scored = await reader.score(queries, documents, options, names)
    rows = [
        {"object": "score", "index": index, "score": score}
        for index, score in enumerate(scored.rows)
    ]
    return _list("score", rows, body, reader, scored.usage)


def parse_pooling(
    kind: type[Kind], data: Mapping[str, Any], options: PoolingOptions
) -> tuple[Kind, PoolingOptions]:
    """A body's fields, and the options with what the body says.

    Raises:
        RequestError: a field is wrong.
        UnsupportedParameterError: a field is known, and not built.
    """
    for name, neutral in REFUSED_FIELDS.items():
        if data.get(name) is not None and data[name] not in neutral:
            raise UnsupportedParameterError(f"{name} is not supported", name)
    body = parse_body(kind, data)
    return body, PoolingOptions(
        model=body.model,
        add_special_tokens=body.add_special_tokens,
        priority=options.priority if body.priority is None else body.priority,
        cache_salt=body.cache_salt,
        timeout_s=options.timeout_s,
    )


def _list(
    prefix: str, rows: list[dict[str, Any]], body: PoolingBody, reader: Reader, usage: Usage
) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or reader.model_name,
        "data": rows,
        "usage": pooling_usage(usage),
    }
