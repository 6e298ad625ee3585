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
from starlette.types import Receive, Scope, Send

from cluster.errors import UnsupportedParameterError
from gateway.convert import PRIORITY_HEADER, header_priority, prompt_list
from gateway.core import Gateway
from gateway.delta import Usage
from gateway.field_checks import given_one
from gateway.http_edge import Responder, dump_json, read_json, run_until_gone, timeout_header_s
from gateway.inspect_json import InspectBody, inspect_answer, inspect_fields
from gateway.inspecting import MAX_JSON_BYTES, Inspecting
from gateway.reading_bodies import PromptField, ReadingBody, mask_list, reading_usage
from gateway.readings import Reader, ReadingOptions
from gateway.schema import Items, parse_body


class EmbeddingsBody(ReadingBody):
    """``POST /v1/embeddings``."""

    input: PromptField
    encoding_format: Literal["float", "base64"] | None = None
    pooling: str | None = None


class ClassifyBody(ReadingBody):
    """``POST /classify``."""

    input: PromptField
    labels: Items[str] | None = None
    attention_mask: Items[int] | Items[Items[int]] | None = None


class ScoreBody(ReadingBody):
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

Kind = TypeVar("Kind", bound=ReadingBody)
Serve = Callable[[Mapping[str, Any], ReadingOptions], Awaitable[dict[str, Any] | bytes]]
"""Serves one body; ``ReadingOptions`` has what the headers say."""


class ReadingEndpoint:
    """One of these routes, as an ASGI application: it must see the client leave."""

    def __init__(self, gateway: Gateway, serve: Serve) -> None:
        self._gateway = gateway
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        request = Request(scope, receive)
        limits = self._gateway.limits
        data = await read_json(request, limits.max_body_bytes, limits.max_json_depth)
        options = ReadingOptions(
            priority=header_priority(request.headers.get(PRIORITY_HEADER)),
            timeout_s=timeout_header_s(request),
        )
        responder = send if isinstance(send, Responder) else Responder(send)
        await run_until_gone(receive, responder, self._answer(data, options, responder))

    async def _answer(
        self, data: Mapping[str, Any], options: ReadingOptions, responder: Responder
    ) -> None:
        await responder.json(await self._serve(data, options))

    @classmethod
    def all(cls, gateway: Gateway) -> dict[str, ReadingEndpoint]:
        """Every such route by its path."""
        served = {
            "/v1/embeddings": _embeddings,
            "/classify": _classify,
            "/score": _score,
            "/v1/score": _score,
        }
        reader = Reader(gateway)
        found = {path: cls(gateway, partial(serve, reader)) for path, serve in served.items()}
        return found | {"/v1/inspect": cls(gateway, InspectAnswers(gateway).serve)}


class InspectAnswers:
    """``POST /v1/inspect``."""

    def __init__(self, gateway: Gateway) -> None:
        self._name = gateway.model_name
        self._inspecting = Inspecting(gateway)

    async def serve(self, data: Mapping[str, Any], options: ReadingOptions) -> bytes:
        """The answer to a body."""
        body, options = parse_reading(InspectBody, data, options)
        fields = inspect_fields(body)
        async with self._inspecting.inspect(fields, options, MAX_JSON_BYTES) as found:
            name = body.model or self._name
            return await asyncio.to_thread(lambda: dump_json(inspect_answer(found, name)))


async def _embeddings(
    reader: Reader, data: Mapping[str, Any], options: ReadingOptions
) -> dict[str, Any]:
    body, options = parse_reading(EmbeddingsBody, data, options)
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
        for index, vector in enumerate(embedded.vectors)
    ]
    return _list("embd", rows, body, reader, embedded.usage)


async def _classify(
    reader: Reader, data: Mapping[str, Any], options: ReadingOptions
) -> dict[str, Any]:
    body, options = parse_reading(ClassifyBody, data, options)
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
    reader: Reader, data: Mapping[str, Any], options: ReadingOptions
) -> dict[str, Any]:
    body, options = parse_reading(ScoreBody, data, options)
    names = (
        given_one(queries=body.queries, text_1=body.text_1),
        given_one(documents=body.documents, text_2=body.text_2),
    )
    queries, documents = (prompt_list(getattr(body, name)) for name in names)
    scored = await reader.score(queries, documents, options, names)
    rows = [
        {"object": "score", "index": index, "score": score}
        for index, score in enumerate(scored.scores)
    ]
    return _list("score", rows, body, reader, scored.usage)


def parse_reading(
    kind: type[Kind], data: Mapping[str, Any], options: ReadingOptions
) -> tuple[Kind, ReadingOptions]:
    """A body's fields, and the options with what the body says.

    Raises:
        RequestError: a field is wrong.
        UnsupportedParameterError: a field is known, and not built.
    """
    for name, neutral in REFUSED_FIELDS.items():
        if data.get(name) is not None and data[name] not in neutral:
            raise UnsupportedParameterError(f"{name} is not supported", name)
    body = parse_body(kind, data)
    return body, ReadingOptions(
        model=body.model,
        add_special_tokens=body.add_special_tokens,
        priority=options.priority if body.priority is None else body.priority,
        cache_salt=body.cache_salt,
        timeout_s=options.timeout_s,
    )


def _list(
    prefix: str, rows: list[dict[str, Any]], body: ReadingBody, reader: Reader, usage: Usage
) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or reader.model_name,
        "data": rows,
        "usage": reading_usage(usage),
    }
