"""The stream to one attention worker: requests and aborts out, each step's tokens in.

One ``EngineClient`` is one stream, from its hello to its end. It hands every output to the sink of
its request, once: outputs of an older attempt and repeated indexes are dropped. How many streams
there are, and what happens to the requests of a lost one, is decided in ``engine_pool``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import grpc

from cluster.errors import ExpertMeshError, RequestFailedError
from protos import engine_pb2 as pb
from protos.engine_pb2_grpc import EngineStub
from workers.request import Request, StepOutput, TokenOutput
from workers.wire import request_to_wire, step_from_wire

logger = logging.getLogger(__name__)

PING_S = 1.0
"""Time between two pings."""
SILENCE_LIMIT_S = 5.0
"""A worker that says nothing for so long, not even to pings, is dropped."""
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class OutputSink(Protocol):
    """Takes what comes for one request."""

    def put(self, output: TokenOutput) -> None:
        """News of a choice."""

    def fail(self, error: ExpertMeshError) -> None:
        """The request will not be finished."""


@dataclass(slots=True)
class Submission:
    """A request that an engine works on, as far as it has got."""

    request: Request
    """As it was sent; its attempt is the current one."""
    sink: OutputSink
    """Where its outputs go."""
    open_choices: set[int]
    """Choices that have not ended."""
    outputs: list[list[int]] = field(default_factory=list)
    """By choice, the tokens delivered: what a resubmission would carry."""

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that this request may still need: prompt, and outputs to come."""
        missing = self.request.params.max_tokens * len(self.open_choices)
        done = sum(len(self.outputs[choice]) for choice in self.open_choices)
        is_started = any(self.outputs)
        return missing - done + (0 if is_started else len(self.request.prompt))


class EngineClient:
    """One stream to one worker.

    Args:
        worker: its name.
        address: ``host:port`` of its engine server.
        token: the cluster token.
        gateway: name of this replica.
        silence_limit_s: see ``SILENCE_LIMIT_S``.
        ping_s: see ``PING_S``.
    """

    def __init__(
        self,
        worker: str,
        address: str,
        token: str,
        gateway: str,
        *,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
    ) -> None:
        self.worker = worker
        self.hello: pb.EngineHello | None = None
        """What the worker said of itself; None until it has, and after the end."""
        self.connected = asyncio.Event()
        """Set when the hello came."""
        self._address = address
        self._token = token
        self._gateway = gateway
        self._silence_limit_s = silence_limit_s
        self._ping_s = ping_s
        self._submissions: dict[str, Submission] = {}
        self._outgoing: asyncio.Queue[pb.ToEngine] = asyncio.Queue()
        self._heard_s = time.monotonic()
        self._is_silent = False

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that this worker's requests may still need."""
        return sum(entry.outstanding_tokens for entry in self._submissions.values())

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Hand a request over; its outputs go to ``sink``."""
        choices = request.n
        self._submissions[request.request_id] = Submission(
            request=request,
            sink=sink,
            open_choices=set(range(choices)),
            outputs=[list(ids) for ids in request.output_so_far] or [[] for _ in range(choices)],
        )
        self._outgoing.put_nowait(pb.ToEngine(request=request_to_wire(request)))

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End a request, or some of its choices, at once; never waits. Unknown ids are ignored."""
        entry = self._submissions.get(request_id)
        if entry is None:
            return
        entry.open_choices.difference_update(choices or tuple(entry.open_choices))
        if not entry.open_choices:
            del self._submissions[request_id]
            choices = ()
        abort = pb.Abort(request_id=request_id, choices=choices)
        self._outgoing.put_nowait(pb.ToEngine(abort=abort))

    async def run(self) -> str:
        """Keep the stream until it ends; returns why. Cancel it to end it."""
        self._heard_s = time.monotonic()
        async with grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS) as channel:
            call = EngineStub(channel).Stream(self._messages())
            pinger = asyncio.create_task(self._ping(call))
            try:
                return await self._read(call)
            except grpc.aio.AioRpcError as err:
                return f"{err.code().name}: {err.details()}"
            except asyncio.CancelledError:
                if self._is_silent:  # read() reports our own call.cancel() in this way
                    return f"no sign of life for {self._silence_limit_s} s"
                raise
            finally:
                self.hello = None
                pinger.cancel()
                call.cancel()

    def take_submissions(self) -> list[Submission]:
        """The requests that were not finished, which are no longer this client's."""
        taken = list(self._submissions.values())
        self._submissions.clear()
        return taken

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.ToEngine, pb.FromEngine]) -> str:
        while True:
            message = await call.read()
            if not isinstance(message, pb.FromEngine):
                return "the worker closed the stream"
            self._heard_s = time.monotonic()
            kind = message.WhichOneof("message")
            if kind == "step":
                self._take_step(step_from_wire(message.step))
            elif kind == "hello":
                self.hello = message.hello
                self.connected.set()

    async def _messages(self) -> AsyncIterator[pb.ToEngine]:
        yield pb.ToEngine(hello=pb.Hello(token=self._token, gateway=self._gateway))
        while True:
            yield await self._outgoing.get()

    async def _ping(self, call: grpc.aio.StreamStreamCall[pb.ToEngine, pb.FromEngine]) -> None:
        number = 0
        while True:
            await asyncio.sleep(self._ping_s)
            if time.monotonic() - self._heard_s > self._silence_limit_s:
                self._is_silent = True
                call.cancel()
                return
            number += 1
            self._outgoing.put_nowait(pb.ToEngine(ping=pb.Ping(number=number)))

    def _take_step(self, step: StepOutput) -> None:
        for output in step.outputs:
            entry = self._submissions.get(output.request_id)
            if entry is not None:
                self._take_output(entry, output)

    def _take_output(self, entry: Submission, output: TokenOutput) -> None:
        if output.attempt != entry.request.attempt or output.choice not in entry.open_choices:
            return  # of an older attempt, or of a choice that was ended here
        done = entry.outputs[output.choice]
        repeated = len(done) - output.index
        if repeated < 0:
            self.abort(output.request_id)
            entry.sink.fail(RequestFailedError(f"{self.worker} skipped tokens of this request"))
            return
        news = without_first(output, repeated) if repeated else output
        done.extend(news.token_ids)
        if output.finish_reason is not None:
            entry.open_choices.discard(output.choice)
            if not entry.open_choices:
                del self._submissions[output.request_id]
        entry.sink.put(news)


def without_first(output: TokenOutput, count: int) -> TokenOutput:
    """An output without its first ``count`` tokens, which were delivered before."""
    return replace(
        output,
        index=output.index + min(count, len(output.token_ids)),
        token_ids=output.token_ids[count:],
        logprobs=output.logprobs[count:],
    )
