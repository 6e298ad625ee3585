"""The methods of ``LLM``, ``Client`` and ``AsyncClient``, independent of the transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, Unpack

from expertmesh.loop_thread import LoopThread
from expertmesh.types import (
    ChatOptions,
    Conversation,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PlainPrompt,
    PoolingOutput,
    PoolingRequestOutput,
    PoolingTask,
    Prompt,
    Query,
    RequestOutput,
    SamplingParams,
    check_names,
    list_of_conversations,
    list_of_prompts,
    one_per_prompt,
)

Prompts = Prompt | Sequence[Prompt]
Conversations = Conversation | Sequence[Conversation]
Params = SamplingParams | Sequence[SamplingParams] | None
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Transport(Protocol):
    """Sends calls to a model. All methods run on one event loop and raise ``APIError``."""

    async def generate(self, query: Query) -> RequestOutput:
        """Run one request and return its complete result."""

    def stream(self, query: Query) -> AsyncGenerator[RequestOutput]:
        """Run one request and yield its result in pieces, as they arrive."""

    async def encode(
        self, prompt: PlainPrompt, task: PoolingTask, pooling: str | None, model: str | None
    ) -> list[float]:
        """Return the embedding of one prompt, or the probabilities of its classes."""

    async def close(self) -> None:
        """Close the connections."""


class AsyncCalls:
    """Asynchronous methods of a client. ``lora_request`` names the adapter of a call.

    Failed calls raise ``APIError`` or a subclass; some invalid arguments raise ``ValueError``.

    Args:
        transport: sends the calls to the model.
        model: name of a model or adapter; None selects the served model.
        limit: maximum number of concurrent requests; further ones wait. Streams do not count.
    """

    def __init__(self, transport: Transport, model: str | None = None, limit: int = 128) -> None:
        self._transport = transport
        self._model = model
        self._running = asyncio.Semaphore(limit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def generate(
        self, prompts: Prompts, sampling_params: Params = None, *, lora_request: str | None = None
    ) -> list[RequestOutput]:
        """Complete prompts concurrently; return one result per prompt, in their order."""
        queries = self._completions(prompts, sampling_params, lora_request)
        return await self._together(self._transport.generate, queries)

    def generate_stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: str | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Complete one prompt; yield pieces of its outputs as the model produces them."""
        (query,) = self._completions([prompt], sampling_params, lora_request)
        return self._transport.stream(query)

    async def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Continue one or several conversations; return one result for each, in their order."""
        queries = self._chats(messages, sampling_params, options)
        return await self._together(self._transport.generate, queries)

    def chat_stream(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[RequestOutput]:
        """Continue one conversation; yield pieces of its outputs as the model produces them."""
        (query,) = self._chats([messages], sampling_params, options)
        return self._transport.stream(query)

    async def encode(
        self,
        prompts: Prompts,
        *,
        pooling_task: PoolingTask = "embed",
        pooling: str | None = None,
        lora_request: str | None = None,
    ) -> list[PoolingRequestOutput]:
        """Return one embedding per prompt, or the probabilities of its classes (``classify``).

        ``pooling`` of embeddings is ``last`` (default) or ``mean``.
        """
        if pooling_task not in ("embed", "classify"):
            raise ValueError(f"pooling_task ({pooling_task}) must be embed or classify")
        if pooling is not None and pooling_task == "classify":
            raise ValueError(f"pooling ({pooling}) must be None with pooling_task classify")
        model = self._name(lora_request)

        async def encode_one(prompt: PlainPrompt) -> PoolingRequestOutput:
            data = await self._transport.encode(prompt, pooling_task, pooling, model)
            return PoolingRequestOutput(PoolingOutput(data))

        return await self._together(encode_one, list_of_prompts(prompts))

    async def embed(
        self, prompts: Prompts, *, pooling: str | None = None, lora_request: str | None = None
    ) -> list[EmbeddingRequestOutput]:
        """Return one embedding per prompt. ``pooling`` is ``last`` (default) or ``mean``."""
        results = await self.encode(prompts, pooling=pooling, lora_request=lora_request)
        return [EmbeddingRequestOutput(EmbeddingOutput(one.outputs.data)) for one in results]

    def _name(self, adapter: object) -> str | None:
        if adapter is not None and not isinstance(adapter, str):
            raise ValueError(f"lora_request ({str(adapter)[:64]}) must be the name of an adapter")
        return adapter or self._model

    def _completions(self, prompts: Prompts, params: Params, adapter: str | None) -> list[Query]:
        model, plain = self._name(adapter), list_of_prompts(prompts)
        pairs = zip(plain, one_per_prompt(params, len(plain)), strict=True)
        return [Query(own, prompt=prompt, model=model) for prompt, own in pairs]

    def _chats(self, chats: Conversations, params: Params, options: ChatOptions) -> list[Query]:
        check_names(options, ChatOptions)
        template = {name: value for name, value in options.items() if value is not None}
        model = self._name(template.pop("lora_request", None))
        plain = list_of_conversations(chats)
        pairs = zip(plain, one_per_prompt(params, len(plain)), strict=True)
        return [Query(own, messages=chat, chat=template, model=model) for chat, own in pairs]

    async def _together(
        self, call: Callable[[Any], Awaitable[Result]], inputs: Sequence[Any]
    ) -> list[Result]:
        """Call a function for all inputs concurrently; the first error cancels the others."""

        async def call_one(value: Any) -> Result:
            async with self._running:
                return await call(value)

        tasks = [asyncio.ensure_future(call_one(value)) for value in inputs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _blocking(
    method: Callable[Concatenate[AsyncCalls, Arguments], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[SyncCalls, Arguments], Result]:
    """Make a method that waits for a coroutine of ``AsyncCalls``."""

    @wraps(method)
    def call(calls: SyncCalls, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return calls._thread.run(method(calls._calls, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[AsyncCalls, Arguments], AsyncGenerator[Result]],
) -> Callable[Concatenate[SyncCalls, Arguments], Iterator[Result]]:
    """Make a method that iterates over a stream of ``AsyncCalls``."""

    @wraps(method)
    def call(
        calls: SyncCalls, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Iterator[Result]:
        return calls._thread.iterate(method(calls._calls, *args, **kwargs))

    return call


class SyncCalls:
    """``AsyncCalls`` for synchronous programs. Thread-safe. Close it, preferably by ``with``.

    Args:
        make: makes the ``AsyncCalls``. It and all calls run on an event loop in another thread.
    """

    def __init__(self, make: Callable[[], AsyncCalls]) -> None:
        async def start() -> AsyncCalls:
            return make()

        self._thread, self._is_closed = LoopThread(), False
        try:
            self._calls = self._thread.run(start())
        except BaseException:
            self._thread.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, or free the model. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            try:
                self._thread.run(self._calls.close())
            finally:
                self._thread.close()

    generate = _blocking(AsyncCalls.generate)
    generate_stream = _iterating(AsyncCalls.generate_stream)
    chat = _blocking(AsyncCalls.chat)
    chat_stream = _iterating(AsyncCalls.chat_stream)
    encode = _blocking(AsyncCalls.encode)
    embed = _blocking(AsyncCalls.embed)
