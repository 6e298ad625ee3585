"""Client of one attention worker: sends requests and aborts, and receives tokens.

An ``EngineClient`` uses one stream. It passes each output to the sink of its request exactly once:
outputs of older attempts and repeated tokens are dropped. Changes that concern more than one
request become events (``stream_events``), which ``engine_pool`` handles.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from msgspec.structs import replace

from gateway.engines.engine_stream import EngineStream, StreamEnd
from gateway.engines.router import WorkerLoad
from gateway.engines.stream_events import (
    MessageReceived,
    RequestChange,
    RequestEvent,
    StreamEvents,
    TokensReceived,
)
from gateway.engines.submission import (
    CountedLoad,
    RequestStage,
    Submission,
    without_first,
)
from workers.requests.block_hash import KvEvents
from workers.requests.request import Queued, SoloStage, SoloStep, StepOutput, TokenOutput
from workers.requests.wire import (
    Abort,
    EngineHello,
    FromEngine,
    KvPressure,
    Paused,
    Prefetch,
    Prefetched,
)

logger = logging.getLogger(__name__)

_SHORT_OF_KV = 0.125
"""Fraction of free KV blocks below which the blocks, not the seats, limit a worker's requests."""


class EngineClient:
    """Client of one attention worker: sends requests to the worker, and tracks their load.

    Args:
        stream: the stream to the worker.
        events: receives the events that concern more than one request.
    """

    def __init__(self, stream: EngineStream, events: StreamEvents) -> None:
        self.worker = stream.endpoint.name
        self.node = stream.endpoint.node
        self.group = stream.endpoint.group
        """Step group of the worker, which may change."""
        self.stream = stream
        self.load = WorkerLoad(name=self.worker)
        """Load of this gateway's requests at the worker."""
        self._events = events
        self._submissions: dict[str, Submission] = {}

    @property
    def hello(self) -> EngineHello | None:
        """Facts about the worker from the handshake; None before it and after the stream's end."""
        return self.stream.hello

    @property
    def submissions(self) -> list[Submission]:
        """Unfinished requests of this gateway at the worker."""
        return list(self._submissions.values())

    def set_group(self, group: str) -> bool:
        """Set the worker's step group; return whether it has changed."""
        before, self.group = self.group, group
        return group != before

    def find(self, request_id: str) -> Submission | None:
        """Return an unfinished request of this gateway at the worker; None if it is not there."""
        return self._submissions.get(request_id)

    async def run(self) -> StreamEnd:
        """Handle the worker's messages until the stream ends; return the reason of the end.

        Cancelling this call ends the stream.
        """
        return await self.stream.run(self._receive)

    async def _receive(self, message: FromEngine) -> None:
        self.take(message)
        if isinstance(message, StepOutput):
            await asyncio.sleep(0)  # clients get these outputs before the next message

    def submit(self, entry: Submission) -> None:
        """Send a request to the worker. The outputs go to the sink of ``entry``."""
        entry.stream, entry.was_sent, entry.is_computing = self, True, True
        entry.engine = self.stream.endpoint.engine
        self._submissions[entry.request.request_id] = entry
        self._update_load(entry)
        self.stream.send(entry.message(time.monotonic()))

    def prefetch(self, entry: Submission, source: EngineClient) -> None:
        """Let the worker fetch the KV blocks of a request that ``source`` has and that will move to
        this worker."""
        message = entry.message(time.monotonic())
        self.stream.send(Prefetch(request=replace(message, kv_peer=source.worker)))

    def detach(self, entry: Submission) -> None:
        """Abort a request at this worker, because it continues at another worker."""
        self.stream.send(Abort(request_id=entry.request.request_id))
        self._release(entry)

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """Abort a request, or some of its choices, without waiting for the worker.

        Empty ``choices`` means all choices. Unknown ids are ignored.
        """
        entry = self._submissions.get(request_id)
        if entry is None:
            return
        entry.close(choices)
        self._update_load(entry)
        if not entry.open_choices:
            self._release(entry)
            choices = ()
        self.stream.send(Abort(request_id=request_id, choices=tuple(choices)))

    def num_seats(self, max_num_seqs: int) -> int:
        """Number of sequences of this gateway that the worker can run, at most ``max_num_seqs``."""
        hello, load = self.hello, self.load
        if hello is None or not hello.kv_block_size or not load.num_decoding:
            return max_num_seqs
        is_short = load.free_tokens < hello.max_kv_tokens * _SHORT_OF_KV
        return min(load.num_decoding, max_num_seqs) if is_short else max_num_seqs

    def take_submissions(self) -> list[Submission]:
        """Remove and return the unfinished requests of this worker."""
        taken = self.submissions
        for entry in taken:
            self._release(entry)
        return taken

    def _report(self, change: RequestChange, entry: Submission) -> None:
        self._events.put(RequestEvent(change, self, entry))

    def _update_load(self, entry: Submission) -> None:
        """Update the request's part of the worker's load."""
        before, now = entry.counted_load, CountedLoad()
        if entry.stream is self:
            is_new, choices = entry.is_computing, len(entry.open_choices)
            queued, num_decoding = entry.missing_tokens if is_new else 0, 0 if is_new else choices
            now = CountedLoad(queued, num_decoding, entry.outstanding_tokens)
        self.load.queued_tokens += now.queued_tokens - before.queued_tokens
        self.load.num_decoding += now.num_decoding - before.num_decoding
        self.load.outstanding_tokens += now.outstanding_tokens - before.outstanding_tokens
        entry.counted_load = now

    def _end_prompt(self, entry: Submission) -> None:
        if entry.is_computing:
            entry.is_computing = False
            self._report(RequestChange.PROMPT_SETTLED, entry)

    def _release(self, entry: Submission) -> None:
        del self._submissions[entry.request.request_id]
        self._end_prompt(entry)
        entry.stream, entry.last_worker = None, self.worker
        self._update_load(entry)
        self._report(RequestChange.RELEASED, entry)

    def take(self, message: FromEngine) -> None:
        """Handle one message of the worker."""
        match message:
            case StepOutput():
                self._deliver_step(message)
            case Queued():
                self._note_queued(message)
            case Prefetched() | Paused():
                self._events.put(MessageReceived(self, message))
            case KvPressure():
                entry = self._submissions.get(message.request_id)
                if entry is not None and entry.attempt == message.attempt:
                    self._report(RequestChange.KV_PRESSURE, entry)
            case SoloStep():
                self._note_solo_step(message)
            case KvEvents():
                self.load.fetch_cost = message.fetch_cost
                block_size = self.hello.kv_block_size if self.hello is not None else 0
                self.load.free_tokens = message.num_free * block_size
                self._events.put(MessageReceived(self, message))

    def _note_solo_step(self, solo_step: SoloStep) -> None:
        """Record a stage of a solo step (with rows of only one request), and acknowledge the stage.

        If the worker dies between the stages ``CERTAIN`` and ``OVER``, the request counts as the
        cause.
        """
        entry = self._submissions.get(solo_step.request_id)
        is_here = entry is not None and entry.attempt == solo_step.attempt
        if entry is not None and is_here and solo_step.stage is SoloStage.OFFERED:
            self._report(RequestChange.SUSPECTED, entry)
            is_here = entry.stream is self
        if entry is not None and is_here and solo_step.stage is SoloStage.CERTAIN:
            entry.set_stage(RequestStage.ALONE)
        elif entry is not None and is_here and solo_step.stage is SoloStage.OVER:
            entry.clear()
        if is_here or solo_step.stage is not SoloStage.OFFERED:
            self.stream.send(solo_step)

    def _note_queued(self, queued: Queued) -> None:
        entry = self._submissions.get(queued.request_id)
        if entry is None or entry.attempt != queued.attempt:
            return
        was_alone = entry.must_be_sent_alone
        entry.set_stage(RequestStage.QUEUED)
        if was_alone:
            self._report(RequestChange.QUEUED_ALONE, entry)
        if entry.pauses:
            self._report(RequestChange.WILL_PAUSE, entry)

    def _deliver_step(self, step: StepOutput) -> None:
        """Pass a step's outputs to their sinks, first tokens of choices before later tokens."""
        now_s = time.monotonic()
        entries = []
        for output in sorted(step.outputs, key=lambda output: output.index > 0):
            entry = self._submissions.get(output.request_id)
            if entry is not None and self._deliver_output(entry, output):
                entries.append(entry)
        if entries:
            self._events.put(TokensReceived(entries, now_s))

    def _deliver_output(self, entry: Submission, output: TokenOutput) -> bool:
        """Deliver the new tokens of an output; return whether the output has new tokens."""
        if output.attempt != entry.attempt or output.choice not in entry.open_choices:
            return False  # from an older attempt, or for an ended choice
        repeated = len(entry.outputs[output.choice]) - output.index
        is_gap = repeated < 0  # outputs between were lost
        if is_gap or entry.is_handed_back(output):
            reason = "outputs are missing" if is_gap else output.error or "the worker aborted it"
            logger.info("request %s was handed back: %s", output.request_id, reason)
            self.detach(entry)
            entry.num_returns += 1
            self._report(RequestChange.RETURNED, entry)
            return False
        fresh = without_first(output, repeated) if repeated else output
        is_first, is_last = entry.is_computing, fresh.finish_reason is not None
        may_change = is_first or is_last or not any(entry.outputs)
        self._end_prompt(entry)
        if not may_change:  # the choice continues to decode
            self.load.outstanding_tokens -= len(fresh.token_ids)
            entry.counted_load.outstanding_tokens -= len(fresh.token_ids)
        entry.deliver(fresh)  # which may abort the request
        if may_change:
            self._update_load(entry)
        if is_first and entry.open_choices:
            self._report(RequestChange.PROMPT_COMPUTED, entry)
        if not entry.open_choices and entry.stream is self:
            self._release(entry)
        return bool(fresh.token_ids)
