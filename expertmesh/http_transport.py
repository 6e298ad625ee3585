"""Calls over HTTP: the OpenAI endpoints, with vLLM's fields."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from expertmesh.errors import APIConnectionError, APIError, APITimeoutError, make_error
from expertmesh.options import DEFAULT_TIMEOUT_S, ClientOptions, tls_context
from expertmesh.types import (
    CompletionOutput,
    Logprob,
    LogprobsByToken,
    PlainPrompt,
    PoolingTask,
    Query,
    RequestOutput,
)

_STATUSES = {
    "model_not_found": 404,
    "invalid_request_error": 400,
    "timeout_error": 504,
    "conflict_error": 409,
    "overloaded_error": 429,
    "service_unavailable": 503,
}
"""HTTP status by the code or type of an error that ends a stream, if it is not 500."""


class HttpTransport:
    """``Transport`` over HTTP. Construct it on the event loop that makes the calls.

    Args:
        url: URL of the server.
        options: options of the client.
    """

    def __init__(self, url: str, options: ClientOptions) -> None:
        key = options.get("api_key")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = options.get("timeout_s", DEFAULT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls_context(options)),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            read_bufsize=1 << 26,  # also limits the length of an event
        )

    async def generate(self, query: Query) -> RequestOutput:
        async with self._post(*_request(query)) as response:
            body = await response.json()
        return _output(body, query, is_whole=True)

    async def stream(self, query: Query) -> AsyncGenerator[RequestOutput]:
        path, body = _request(query)
        has_ended = False
        async with self._post(path, {**body, "stream": True}) as response:
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    has_ended = True
                    break
                if line.startswith(b"data:"):
                    event = json.loads(data)
                    if (error := event.get("error")) is not None:
                        known = _STATUSES.get(error["type"], 500)
                        raise _error(event, _STATUSES.get(error.get("code"), known), {})
                    yield _output(event, query, is_whole=False)
        if not has_ended:
            raise APIConnectionError("the stream ended before the output was finished")

    async def encode(
        self, prompt: PlainPrompt, task: PoolingTask, pooling: str | None, model: str | None
    ) -> list[float]:
        body: dict[str, Any] = {"input": prompt, "model": model}
        path, name = "/classify", "probs"
        if task == "embed":
            body |= {"pooling": pooling, "encoding_format": "float"}
            path, name = "/v1/embeddings", "embedding"
        async with self._post(path, body) as response:
            values: list[float] = (await response.json())["data"][0][name]
        return list(map(float, values))

    async def close(self) -> None:
        await self._session.close()

    @asynccontextmanager
    async def _post(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.post(self._url + path, json=body) as response:
                if response.status != 200:
                    found: Any = None
                    with suppress(ValueError):
                        found = json.loads(await response.read())
                    raise _error(found, response.status, response.headers)
                yield response
        except TimeoutError as err:
            text = f"{self._url} did not finish within timeout_s ({self._timeout_s:g} s)"
            raise APITimeoutError(text, "deadline_exceeded") from err
        except (aiohttp.ClientError, OSError) as err:
            raise APIConnectionError(f"cannot reach {self._url}: {err}") from err


def _error(body: Any, status: int, headers: Mapping[str, str]) -> APIError:
    """Make the exception for a response with an error status, with or without an error object."""
    after_ms, after = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    after_s = float(after) if after.isdecimal() else None  # it may be a date
    after_s = int(after_ms) / 1000 if after_ms.isdecimal() else after_s
    found = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(found, Mapping):
        return make_error(f"HTTP status {status}", "", None, status, after_s)
    message, code = str(found.get("message")), str(found.get("code") or "")
    return make_error(message, code, found.get("param"), status, after_s)


def _request(query: Query) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a call."""
    body = query.params.given()
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    if query.model is not None:
        body["model"] = query.model
    if query.prompt is not None:
        return "/v1/completions", {**body, "prompt": query.prompt}
    if (count := body.pop("logprobs", None)) is not None:
        body |= {"logprobs": True, "top_logprobs": count}
    return "/v1/chat/completions", {**body, **query.chat, "messages": query.messages}


def _output(body: Mapping[str, Any], query: Query, *, is_whole: bool) -> RequestOutput:
    """Convert the body of a response, or an event of a stream if ``is_whole`` is False."""
    choices = body["choices"]
    holder = body if query.prompt is None else choices[0] if choices else {}
    scores = holder.get("prompt_logprobs")
    return RequestOutput(
        request_id=body["id"],
        prompt=query.prompt if isinstance(query.prompt, str) else None,
        prompt_token_ids=list(holder.get("prompt_token_ids") or ()),
        outputs=[_choice(choice, query) for choice in choices],
        prompt_logprobs=None if scores is None else [_prompt_entry(one) for one in scores],
        finished=is_whole,
    )


def _choice(choice: Mapping[str, Any], query: Query) -> CompletionOutput:
    message = choice.get("message") or choice.get("delta") or {}
    found, positions = choice.get("logprobs"), None
    if query.params.logprobs is not None:
        positions = list((_chat_logprobs if query.prompt is None else _logprobs)(found or {}))
    return CompletionOutput(
        index=choice["index"],
        text=choice.get("text") or message.get("content") or "",
        token_ids=list(choice.get("token_ids") or ()),
        cumulative_logprob=None if positions is None else sum(value for value, _ in positions),
        logprobs=None if positions is None else [one for _, one in positions],
        finish_reason=choice.get("finish_reason"),
        stop_reason=choice.get("stop_reason"),
        reasoning=message.get("reasoning_content") or "",
    )


_Positions = Iterator[tuple[float, LogprobsByToken]]
"""For each token, its log-probability and all log-probabilities at its position."""


def _logprobs(found: Mapping[str, Any]) -> _Positions:
    names = ("tokens", "token_logprobs", "top_logprobs")
    for token, value, top in zip(*(found.get(name, ()) for name in names), strict=True):
        values = {token: value, **top}
        yield value, {_token_id(name): Logprob(one) for name, one in values.items()}


def _chat_logprobs(found: Mapping[str, Any]) -> _Positions:
    for entry in found.get("content") or ():
        by_token = {}
        for one in (entry, *entry["top_logprobs"]):
            text = bytes(one["bytes"]).decode(errors="replace")
            by_token[_token_id(one["token"])] = Logprob(one["logprob"], None, text)
        yield entry["logprob"], by_token


def _prompt_entry(entry: Mapping[str, Any] | None) -> LogprobsByToken | None:
    return None if entry is None else {int(name): Logprob(**one) for name, one in entry.items()}


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
