"""The methods of ``LLM``, ``Client`` and ``AsyncClient``, independent of the transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from expertmesh.loop_thread import LoopThread
from expertmesh.types import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Message,
    Prompt,
    Query,
    RequestOutput,
    SamplingParams,
    list_of_prompts,
    one_per_prompt,
)

_MAX_CONCURRENT = 128
"""Maximum number of concurrent requests of one client object; further requests wait in it."""


class Transport(Protocol):
    """Sends calls to a model. All methods run on one event loop and raise ``APIError``."""

    async def generate(self, query: Query) -> RequestOutput:
        """Run one request and return its complete result."""

    def stream(self, query: Query) -> AsyncGenerator[RequestOutput]:
        """Run one request and yield its result in pieces, as they arrive."""

    async def embed(
        self, prompt: str | tuple[int, ...], pooling: str | None, model: str | None
    ) -> list[float]:
        """Return the embedding of one prompt: a vector of ``hidden_size`` numbers."""

    async def close(self) -> None:
        """Close the connections."""


class AsyncCalls:
    """Asynchronous methods of a client. Every call raises ``APIError`` or a subclass.

    Args:
        transport: sends the calls to the model.
        model: name of a model or adapter; None selects the served model.
    """

    def __init__(self, transport: Transport, model: str | None = None) -> None:
        self._transport = transport
        self._model = model
        self._running = asyncio.Semaphore(_MAX_CONCURRENT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts concurrently; return one result per prompt, in their order."""
        return await self._generate(self._completions(prompts, sampling_params))

    def generate_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """Complete one prompt; yield pieces of its outputs as the model produces them."""
        (query,) = self._completions([prompt], sampling_params)
        return self._transport.stream(query)

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue one or several conversations; return one result for each, in their order."""
        chats: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        each = one_per_prompt(sampling_params, len(chats))
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        pairs = zip(chats, each, strict=True)
        return await self._generate([self._chat(chat, one, options) for chat, one in pairs])

    def chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """Continue one conversation; yield pieces of its outputs as the model produces them."""
        return self._transport.stream(self._chat(messages, sampling_params or SamplingParams(), {}))

    async def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str | None = None
    ) -> list[EmbeddingRequestOutput]:
        """Return one embedding per prompt. ``pooling`` is ``last`` (default) or ``mean``."""

        async def one(prompt: str | tuple[int, ...]) -> EmbeddingRequestOutput:
            async with self._running:
                vector = await self._transport.embed(prompt, pooling, self._model)
            return EmbeddingRequestOutput(EmbeddingOutput(vector))

        return await _together([one(prompt) for prompt in list_of_prompts(prompts)])

    def _completions(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Query]:
        plain = list_of_prompts(prompts)
        pairs = zip(plain, one_per_prompt(params, len(plain)), strict=True)
        return [Query(own, prompt=prompt, model=self._model) for prompt, own in pairs]

    def _chat(
        self, messages: Sequence[Message], params: SamplingParams, options: Mapping[str, Any]
    ) -> Query:
        given = {name: value for name, value in options.items() if value is not None}
        return Query(params, messages=tuple(messages), chat=given, model=self._model)

    async def _generate(self, queries: Sequence[Query]) -> list[RequestOutput]:
        async def one(query: Query) -> RequestOutput:
            async with self._running:
                return await self._transport.generate(query)

        return await _together([one(query) for query in queries])


async def _together(work: Sequence[Any]) -> list[Any]:
    """Run coroutines concurrently; the first error cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class SyncCalls:
    """``AsyncCalls`` for synchronous programs. Thread-safe. Close it, preferably by ``with``.

    Every call raises ``APIError`` or a subclass.

    Args:
        calls: the asynchronous methods, which run in ``thread``.
        thread: the thread with the event loop; ``close`` ends it.
    """

    def __init__(self, calls: AsyncCalls, thread: LoopThread) -> None:
        self._calls = calls
        self._thread = thread
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, or free the model. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.run(self._calls.close())
            self._thread.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """See ``AsyncCalls.generate``."""
        return self._thread.run(self._calls.generate(prompts, sampling_params))

    def generate_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """See ``AsyncCalls.generate_stream``."""
        return self._thread.iterate(self._calls.generate_stream(prompt, sampling_params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """See ``AsyncCalls.chat``."""
        work = self._calls.chat(
            messages,
            sampling_params,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._thread.run(work)

    def chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """See ``AsyncCalls.chat_stream``."""
        return self._thread.iterate(self._calls.chat_stream(messages, sampling_params))

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str | None = None
    ) -> list[EmbeddingRequestOutput]:
        """See ``AsyncCalls.embed``."""
        return self._thread.run(self._calls.embed(prompts, pooling=pooling))
