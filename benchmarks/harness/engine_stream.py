"""The gateway side of one engine stream, and the outputs of each request."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from cluster.core.errors import HandshakeError
from cluster.core.release import RELEASE
from workers.requests.request import FinishReason, Request, StepOutput, TokenOutput
from workers.requests.stream_handshake import GatewayHandshake
from workers.requests.wire import FROM_ENGINE, PATH, TO_ENGINE, Abort, ToEngine

TIMEOUT_S = 120.0
"""Longest wait for an output on a busy machine."""
TOKEN = "test-token"
"""Cluster token of all clusters made in tests."""


class EngineStream:
    """The gateway side of one engine stream, in a separate thread."""

    def __init__(
        self,
        address: str,
        token: str = TOKEN,
        release: str = RELEASE,
        first: bytes | None = None,
    ) -> None:
        """Open the stream; ``first`` replaces the hello message."""
        self._outgoing: queue.Queue[bytes | None] = queue.Queue()
        self._incoming: queue.Queue[TokenOutput | Exception] = queue.Queue()
        self._put_back: deque[TokenOutput] = deque()
        self._channel = grpc.insecure_channel(address)
        self._handshake = GatewayHandshake(token, "test", release)
        self._first = self._handshake.start() if first is None else first
        self._proof: queue.Queue[bytes | None] = queue.Queue()
        self._call = self._channel.stream_stream(PATH, bytes, bytes)(self._messages())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        """Send a request or another message."""
        self._outgoing.put(TO_ENGINE.encode(message))

    def abort(self, request_id: str) -> None:
        """Cancel a request."""
        self._outgoing.put(TO_ENGINE.encode(Abort(request_id=request_id)))

    def next(self, timeout_s: float = TIMEOUT_S) -> TokenOutput:
        """Return the next output of any request."""
        if self._put_back:
            return self._put_back.popleft()
        output = self._incoming.get(timeout=timeout_s)
        if isinstance(output, Exception):
            raise output
        return output

    def send_bytes(self, data: bytes) -> None:
        """Send bytes that may be an invalid message."""
        self._outgoing.put(data)

    def put_back(self, outputs: Sequence[TokenOutput]) -> None:
        """Return outputs to the queue, so that ``next`` returns them again."""
        self._put_back.extend(outputs)

    def finish(self, requests: Sequence[Request]) -> dict[str, Result]:
        """Send requests and collect everything until all choices have ended."""
        for request in requests:
            self.send(request)
        return self.collect(requests)

    def collect(self, requests: Sequence[Request]) -> dict[str, Result]:
        """Outputs of requests that were sent, until all choices have ended.

        Tokens begin with those that a request brought along.
        """
        results = {r.request_id: Result(r.n) for r in requests}
        for request in requests:
            for choice, tokens in enumerate(request.output_so_far):
                results[request.request_id].tokens[choice].extend(tokens)
        left = sum(r.n for r in requests)
        while left:
            output = self.next()
            if output.request_id in results:
                left -= results[output.request_id].add(output)
        return results

    def wait_ended(self) -> None:
        """Wait until the other side has ended the stream."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the stream is still open"

    def close(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()
        self._thread.join(TIMEOUT_S)

    def _messages(self) -> Iterator[bytes]:
        yield self._first
        if (proof := self._proof.get()) is not None:
            yield proof
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        try:
            answers = iter(self._call)
            self._proof.put(self._handshake.prove(next(answers)))
            self.hello = self._handshake.finish(next(answers))
            for data in answers:
                message = FROM_ENGINE.decode(data)
                if isinstance(message, StepOutput):
                    for output in message.outputs:
                        self._incoming.put(output)
        except (grpc.RpcError, HandshakeError) as err:
            self._incoming.put(ConnectionError(str(err)))
        finally:
            self._proof.put(None)


@dataclass(slots=True)
class Result:
    """Outputs of one request by choice."""

    n: int
    tokens: list[list[int]]
    outputs: list[TokenOutput]
    reasons: list[FinishReason | None]

    def __init__(self, n: int) -> None:
        self.n = n
        self.tokens = [[] for _ in range(n)]
        self.outputs = []
        self.reasons = [None] * n

    def add(self, output: TokenOutput) -> bool:
        """Add an output; returns whether it ends its choice. Tokens must arrive once, in order."""
        tokens = self.tokens[output.choice]
        if output.token_ids:
            assert output.index == len(tokens), (output, len(tokens))
        tokens.extend(output.token_ids)
        self.outputs.append(output)
        if output.finish_reason is not None:
            assert self.reasons[output.choice] is None, "a choice ended twice"
            self.reasons[output.choice] = output.finish_reason
        return output.finish_reason is not None
