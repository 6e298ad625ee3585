"""An attention worker without a model: the real engine stream, with tokens at a fixed rate.

Token j of all streams goes to stream ``j % num_streams``, so that each stream waits as long as
possible between two tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from benchmarks.harness.engine_stream import TOKEN
from workers.process.engine_server import EngineServer
from workers.process.intake.commands import AddRequest, Inbox
from workers.requests.request import Queued, Request, StepOutput, TokenOutput
from workers.requests.wire import EngineHello

WORKER = "attention-0"
MAX_MODEL_LEN = 4096
STEP_S = 0.01
"""Seconds between two steps, which the tokens of a second are divided into."""
_BASE = 250
_LETTER = 70
"""A token with a printable text."""


def prompt_of(place: int) -> list[int]:
    """Prompt of the stream with the number ``place``, which the worker reads from the prompt."""
    return [5, 6, 7, 8, 9, place // _BASE, place % _BASE]


class PacedEngine:
    """Serves one attention worker's engine stream; ``run`` sends the tokens.

    Args:
        num_streams: number of requests that the worker serves.
        tokens_per_s: tokens of all streams per second.
    """

    def __init__(self, num_streams: int, tokens_per_s: int) -> None:
        self.num_streams = num_streams
        self.num_per_step = round(tokens_per_s * STEP_S)
        """Number of tokens of a step."""
        self.sent_s: list[float] = []
        """Monotonic time of each step."""
        self._wake = threading.Event()
        self._inbox = Inbox(self._wake.set)
        self._server = EngineServer("127.0.0.1", TOKEN, self._inbox, hello_of)
        self._server.admit_streams(1)
        self._owners: dict[int, tuple[str, Request]] = {}

    def start(self) -> str:
        """Serve; returns ``host:port``."""
        return self._server.start()

    def stop(self) -> None:
        """End the stream."""
        self._server.stop()

    def accept_all(self, limit_s: float) -> None:
        """Wait until all streams have sent their requests. Raises ``TimeoutError``."""
        end_s = time.monotonic() + limit_s
        while len(self._owners) < self.num_streams:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{len(self._owners)} of {self.num_streams} requests came")
            self._wake.wait(0.1)
            self._wake.clear()
            for command in self._inbox.take():
                if isinstance(command, AddRequest):
                    request = command.request
                    *_, high, low = request.prompt
                    self._owners[high * _BASE + low] = command.gateway, request
                    queued = Queued(request_id=request.request_id, attempt=request.attempt)
                    self._server.publish(command.gateway, queued)

    def run(self, seconds: float) -> None:
        """Send tokens for some seconds."""
        num_per_step = self.num_per_step
        first, begin_s = len(self.sent_s), time.monotonic()
        for step in range(round(seconds / STEP_S)):
            time.sleep(max(0.0, begin_s + step * STEP_S - time.monotonic()))
            begun = (first + step) * num_per_step
            self.sent_s.append(time.monotonic())
            for gateway, outputs in self._outputs(begun, begun + num_per_step):
                self._server.publish(gateway, StepOutput(outputs=tuple(outputs)))

    def _outputs(self, begin: int, end: int) -> Iterator[tuple[str, list[TokenOutput]]]:
        by_gateway: dict[str, list[TokenOutput]] = {}
        for number in range(begin, end):
            gateway, request = self._owners[number % self.num_streams]
            output = TokenOutput(
                request_id=request.request_id,
                attempt=request.attempt,
                choice=0,
                index=number // self.num_streams,
                token_ids=(_LETTER,),
            )
            by_gateway.setdefault(gateway, []).append(output)
        yield from by_gateway.items()


def hello_of(worker: str = WORKER) -> EngineHello:
    """Description of a small model on a worker, with prefix caching."""
    return EngineHello(
        worker=worker,
        generation=1,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=256,
        eos_token_ids=(0,),
        max_kv_tokens=1 << 24,
        dtype="float32",
        model_type="olmoe",
        hidden_size=8,
        num_layers=2,
        num_attention_layers=2,
        num_heads=2,
        kv_block_size=16,
    )
