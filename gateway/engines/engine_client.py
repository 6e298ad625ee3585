"""The stream to one attention worker: requests and aborts out, each step's tokens in.

One ``EngineClient`` is one stream, from its hello to its end. It hands every output to the sink of
its request, once: outputs of an older attempt and repeated indexes are dropped. ``engine_pool``
decides how many streams there are, and which worker continues the requests of a lost stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from msgspec.structs import replace

from cluster.core.errors import ProtocolError
from cluster.core.release import RELEASE
from gateway.cluster.view import AttentionEndpoint
from gateway.engines.router import WorkerLoad
from gateway.engines.submission import RequestStage, Submission, without_first
from workers.requests.block_hash import KvEvents
from workers.requests.request import Queued, SoloStage, SoloStep, StepOutput, TokenOutput
from workers.requests.stream_handshake import GatewayHandshake
from workers.requests.wire import (
    FROM_ENGINE,
    MAX_MESSAGE_BYTES,
    PATH,
    TO_ENGINE,
    Abort,
    EngineHello,
    FromEngine,
    KeepCopy,
    KvResync,
    Pause,
    Paused,
    Ping,
    Prefetch,
    Prefetched,
    Relieve,
    ToEngine,
)

logger = logging.getLogger(__name__)

PING_S = 1.0
"""Time between two pings."""
SILENCE_LIMIT_S = 5.0
"""Time without a message, answers to pings included, after which a worker is dropped."""
_SHORT_OF_KV = 0.125
"""Share of free KV blocks below which they bound what a worker runs, not its seats."""
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_Call = grpc.aio.StreamStreamCall[bytes, bytes]


_OWN_END = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
"""Status of a stream that a living worker has ended: it may not serve, or drops this gateway."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Why a stream ended."""

    reason: str
    has_died: bool
    """For all that is known, the worker is gone."""


class Owner(Protocol):
    """Receives the events of a stream that concern more than one request."""

    def take_back(self, entry: Submission, reason: str) -> None:
        """A worker will not finish a request that another one can."""

    def take_kv(self, worker: str, events: KvEvents) -> bool:
        """Apply changes of blocks; False if the complete list is needed."""

    def settle(self, entry: Submission, worker: str) -> None:
        """A worker has computed a request's prompt, or will not."""

    def computed(self, client: EngineClient, entry: Submission) -> None:
        """A worker has computed a request's prompt, and goes on with it."""

    def note_token(self, entry: Submission, now_s: float) -> None:
        """A worker has sent tokens of a request."""

    def prefetched(self, client: EngineClient, message: Prefetched) -> None:
        """A worker has fetched the KV blocks of a request that will move to it."""

    def paused(self, client: EngineClient, message: Paused) -> None:
        """A worker computes no more of a request that is about to leave it."""

    def relieve(self, client: EngineClient, entry: Submission) -> None:
        """A worker runs out of KV blocks, and would preempt this request soon."""

    def released(self, entry: Submission) -> None:
        """A request has left its worker, or has ended."""

    def place_waiting(self) -> None:
        """A request that had to be sent alone is no longer on its way."""


class EngineClient:
    """One stream to one worker.

    Args:
        endpoint: the worker.
        token: the cluster token.
        gateway: name of this replica.
        owner: gets requests that the worker hands back, and changes of its KV blocks.
        silence_limit_s: see ``SILENCE_LIMIT_S``.
        ping_s: see ``PING_S``.
        release: of this replica; workers of another one are refused.
    """

    def __init__(
        self,
        endpoint: AttentionEndpoint,
        *,
        token: str,
        gateway: str,
        owner: Owner,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
        release: str = RELEASE,
    ) -> None:
        self.worker = endpoint.name
        self.node = endpoint.node
        self.hello: EngineHello | None = None
        """The worker's hello; None before it, and after the end."""
        self.connected = asyncio.Event()
        """Set when the hello came."""
        self.load = WorkerLoad(name=endpoint.name)
        """What it has to do for this gateway; ``outstanding_tokens`` apart."""
        self._endpoint = endpoint
        self._handshake = GatewayHandshake(token, gateway, release)
        self._proof: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._owner = owner
        self._silence_limit_s = silence_limit_s
        self._ping_s = ping_s
        self._submissions: dict[str, Submission] = {}
        self._outgoing: asyncio.Queue[ToEngine | None] = asyncio.Queue()
        self._heard_s = time.monotonic()
        self._is_silent = False

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that this worker's requests may still need."""
        return sum(entry.outstanding_tokens for entry in self._submissions.values())

    @property
    def num_requests(self) -> int:
        """Requests of this worker."""
        return len(self._submissions)

    def requests_at(self, stage: RequestStage) -> list[Submission]:
        """Requests of this worker that are so far, as it has said."""
        return [entry for entry in self._submissions.values() if entry.stage is stage]

    def submissions(self) -> list[Submission]:
        """All requests of this worker."""
        return list(self._submissions.values())

    def acquit(self, worker: str) -> None:
        """No request of this worker has caused the death of another one, which lives."""
        for entry in self._submissions.values():
            entry.acquit(worker)

    def submit(self, entry: Submission) -> None:
        """Hand a request over; its outputs go to its sink."""
        entry.stream, entry.was_sent, entry.is_computing = self, True, True
        entry.engine = self._endpoint.engine
        self._submissions[entry.request.request_id] = entry
        self._count(entry)
        self._outgoing.put_nowait(entry.message(time.monotonic()))

    def prefetch(self, entry: Submission, source: str) -> None:
        """Have the worker fetch the KV blocks of a request that decodes at another one."""
        request = replace(entry.message(time.monotonic()), kv_peer=source)
        self._outgoing.put_nowait(Prefetch(request=request))

    def keep_copy(self, message: KeepCopy) -> None:
        """Have the worker keep copies of blocks of another one."""
        self._outgoing.put_nowait(message)

    def pause(self, entry: Submission, num_tokens: int) -> None:
        """Have a request of this worker stand still before it leaves, once each of its choices has
        so many tokens with the prompt.
        """
        name = entry.request.request_id
        self._outgoing.put_nowait(Pause(request_id=name, num_tokens=num_tokens))

    def resume(self, entry: Submission) -> None:
        """Have a paused request of this worker go on."""
        self._outgoing.put_nowait(Pause(request_id=entry.request.request_id, is_over=True))

    def give_up(self, entry: Submission) -> None:
        """A request of this worker continues elsewhere."""
        self._outgoing.put_nowait(Abort(request_id=entry.request.request_id))
        self._release(entry)

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End a request, or some of its choices, at once; never waits. Unknown ids are ignored."""
        entry = self._submissions.get(request_id)
        if entry is None:
            return
        entry.close(choices)
        self._count(entry)
        if not entry.open_choices:
            self._release(entry)
            choices = ()
        self._outgoing.put_nowait(Abort(request_id=request_id, choices=tuple(choices)))

    async def run(self) -> StreamEnd:
        """Keep the stream until it ends; returns why. Cancel it to end it."""
        end = await self._run()
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # gRPC swallows one that meets a call's end
            raise asyncio.CancelledError
        return end

    async def _run(self) -> StreamEnd:
        self._heard_s = time.monotonic()
        async with grpc.aio.insecure_channel(
            self._endpoint.address, options=_CHANNEL_OPTIONS
        ) as channel:
            call = channel.stream_stream(PATH, bytes, bytes)(self.messages())
            pinger = asyncio.create_task(self._ping(call))
            try:
                await self._read(call)
                return StreamEnd("the worker closed the stream", has_died=True)
            except grpc.aio.AioRpcError as err:
                reason = f"{err.code().name}: {err.details()}"
                return StreamEnd(reason, has_died=err.code() not in _OWN_END)
            except ProtocolError as err:
                return StreamEnd(str(err), has_died=False)
            except asyncio.CancelledError:
                if self._is_silent:  # read() reports our own call.cancel() in this way
                    reason = f"no sign of life for {self._silence_limit_s} s"
                    return StreamEnd(reason, has_died=True)
                raise
            finally:
                self.hello = None
                pinger.cancel()
                call.cancel()
                self._proof.put_nowait(None)  # gRPC's task that waits for messages ends
                self._outgoing.put_nowait(None)

    def num_places(self, max_num_seqs: int) -> int:
        """Requests of this gateway that the worker runs at once, at most ``max_num_seqs``."""
        hello, load = self.hello, self.load
        if hello is None or not hello.kv_block_size or not load.num_decoding:
            return max_num_seqs
        is_short = load.free_tokens < hello.max_kv_tokens * _SHORT_OF_KV
        return min(load.num_decoding, max_num_seqs) if is_short else max_num_seqs

    def take_submissions(self) -> list[Submission]:
        """The requests that were not finished, which are no longer this client's."""
        taken = list(self._submissions.values())
        for entry in taken:
            self._release(entry)
        return taken

    def _count(self, entry: Submission) -> None:
        """Update the request's part in the load."""
        now = (0, 0)
        if entry.stream is self:
            is_new, choices = entry.is_computing, len(entry.open_choices)
            now = (entry.missing_tokens if is_new else 0, 0 if is_new else choices)
        self.load.queued_tokens += now[0] - entry.counted[0]
        self.load.num_decoding += now[1] - entry.counted[1]
        entry.counted = now

    def _end_prompt(self, entry: Submission) -> None:
        if entry.is_computing:
            entry.is_computing = False
            self._owner.settle(entry, self.worker)

    def _release(self, entry: Submission) -> None:
        del self._submissions[entry.request.request_id]
        self._end_prompt(entry)
        entry.stream, entry.last_worker = None, self.worker
        self._count(entry)
        self._owner.released(entry)

    async def _read(self, call: _Call) -> None:
        if isinstance(data := await call.read(), bytes):
            self.take_challenge(data)
        if isinstance(data := await call.read(), bytes):
            self.hello = self._handshake.finish(data)
            self.connected.set()
        while isinstance(data := await call.read(), bytes):
            self._heard_s = time.monotonic()
            await self._take(FROM_ENGINE.decode(data))

    def take_challenge(self, challenge: bytes) -> None:
        """Prove the token. Raises ``HandshakeError``."""
        self._proof.put_nowait(self._handshake.answer(challenge))

    async def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self.take_step(message)
                await asyncio.sleep(0)  # clients get these outputs before the next message
            case Queued():
                self._note_queued(message)
            case Prefetched():
                self._owner.prefetched(self, message)
            case Paused():
                self._owner.paused(self, message)
            case Relieve():
                entry = self._submissions.get(message.request_id)
                if entry is not None and entry.attempt == message.attempt:
                    self._owner.relieve(self, entry)
            case SoloStep():
                self._note_solo_step(message)
            case KvEvents():
                self.load.fetch_cost = message.fetch_cost
                block_size = self.hello.kv_block_size if self.hello is not None else 0
                self.load.free_tokens = message.num_free * block_size
                if not self._owner.take_kv(self.worker, message):
                    self._outgoing.put_nowait(KvResync())

    async def messages(self) -> AsyncGenerator[bytes]:
        """Messages to the worker, encoded."""
        yield self._handshake.start()
        if (proof := await self._proof.get()) is not None:
            yield proof
        while (message := await self._outgoing.get()) is not None:
            yield TO_ENGINE.encode(message)

    async def _ping(self, call: _Call) -> None:
        number = 0
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(self._ping_s)
            late_s = time.monotonic() - began_s - self._ping_s
            if late_s > self._ping_s:  # this process stalled: messages may wait unread
                self._heard_s += late_s
            if time.monotonic() - self._heard_s > self._silence_limit_s:
                self._is_silent = True
                call.cancel()
                return
            number += 1
            self._outgoing.put_nowait(Ping(number=number))

    def _note_solo_step(self, solo_step: SoloStep) -> None:
        """Record a stage of a request's solo step, and acknowledge it.

        The request is the cause of a death only while its step is certain and not over.
        """
        entry = self._submissions.get(solo_step.request_id)
        is_here = entry is not None and entry.attempt == solo_step.attempt
        if entry is not None and is_here and solo_step.stage is SoloStage.CERTAIN:
            entry.reach(RequestStage.ALONE)
        elif entry is not None and is_here and solo_step.stage is SoloStage.OVER:
            entry.clear()
        if is_here or solo_step.stage is not SoloStage.OFFERED:
            self._outgoing.put_nowait(solo_step)

    def _note_queued(self, queued: Queued) -> None:
        entry = self._submissions.get(queued.request_id)
        if entry is None or entry.attempt != queued.attempt:
            return
        was_alone = entry.must_be_sent_alone
        entry.reach(RequestStage.QUEUED)
        if was_alone:
            self._owner.place_waiting()

    def take_step(self, step: StepOutput) -> None:
        """Hand the outputs of a step to their sinks.

        First tokens go before others, so that they do not wait for all running streams.
        """
        now_s = time.monotonic()
        for output in sorted(step.outputs, key=lambda output: output.index > 0):
            entry = self._submissions.get(output.request_id)
            if entry is not None:
                self._take_output(entry, output, now_s)

    def _take_output(self, entry: Submission, output: TokenOutput, now_s: float) -> None:
        if output.attempt != entry.attempt or output.choice not in entry.open_choices:
            return  # of an older attempt, or of a choice that was ended here
        repeated = len(entry.outputs[output.choice]) - output.index
        is_gap = repeated < 0  # outputs were lost on the way
        if is_gap or entry.is_handed_back(output):
            reason = "outputs are missing" if is_gap else output.error or "the worker gave it up"
            self.give_up(entry)
            entry.num_returns += 1
            self._owner.take_back(entry, reason)
            return
        fresh = without_first(output, repeated) if repeated else output
        is_first, is_last = entry.is_computing, fresh.finish_reason is not None
        self._end_prompt(entry)
        if fresh.token_ids:
            self._owner.note_token(entry, now_s)
        entry.deliver(fresh)
        if is_first or is_last:
            self._count(entry)
        if is_first and entry.open_choices:
            self._owner.computed(self, entry)
        if not entry.open_choices and entry.stream is self:
            self._release(entry)
