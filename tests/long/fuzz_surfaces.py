"""Where fuzzed inputs go in: HTTP, gRPC, and the sockets between the parts of a cluster.

A surface sends one input and says what came of it. Only ``failed`` and ``hung`` are wrong.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import grpc

from cluster.core.control_codec import encode
from cluster.core.frames import ControlHello, ControlProof, Heartbeat, Register
from cluster.core.proof import TokenProof
from cluster.core.release import RELEASE
from cluster.core.topology import Member
from tests.long.fuzz_inputs import BODIES, MESSAGES, Mutator
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.handshake import ConnectorHandshake, PeerIdentity

Outcome = Literal["accepted", "refused", "closed", "failed", "hung"]
OUTCOMES: tuple[Outcome, ...] = ("accepted", "refused", "closed", "failed", "hung")
"""An answer; an error that says what is wrong; a connection ended; a fault of ours; no answer."""
Address = tuple[str, int]
WAIT_S = 60.0
"""Longest wait for an answer, on a machine that is busy with other work."""
_PATIENCE_S = 0.3
"""Spoilt headers may leave the server waiting for more."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_BAD_CODES = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is fuzzed."""

    http: Address
    """Where HTTP is served."""
    grpc: str
    """Where gRPC is served."""
    sockets: Mapping[str, Address]
    """Listeners of the cluster's own processes, by what they are."""


@dataclass(frozen=True, slots=True)
class Result:
    """One input and what came of it."""

    outcome: Outcome
    """See ``OUTCOMES``."""
    what: str = ""
    """Status and input, where it is wrong."""


class Surface(Protocol):
    """A way in."""

    def send(self, mutator: Mutator) -> Result:
        """Send one input."""

    def close(self) -> None:
        """Give connections back."""


def surfaces(target: Target) -> dict[str, tuple[int, Callable[[], Surface]]]:
    """Every way in by name: its share of the inputs in percent, and what makes one of it."""
    return {
        "HTTP bodies": (30, lambda: HttpBodies(target.http)),
        "HTTP headers": (10, lambda: HttpHeaders(target.http)),
        "gRPC messages": (30, lambda: GrpcMessages(target.grpc)),
        "sockets": (30, lambda: Sockets(target)),
    }


class HttpBodies:
    """Bodies to every route, over connections that are kept."""

    def __init__(self, address: Address) -> None:
        self._connection = http.client.HTTPConnection(*address, timeout=WAIT_S)

    def send(self, mutator: Mutator) -> Result:
        path = mutator.random.choice(tuple(BODIES))
        body = mutator.body(path)
        try:
            try:
                answer, content = self._post(path, body)
            except ConnectionError:  # closed after a while without requests: once more
                self._connection.close()
                answer, content = self._post(path, body)
        except TimeoutError:
            self._connection.close()
            return Result("hung", f"{path} {body[:300]!r}")
        except (OSError, http.client.HTTPException) as err:
            self._connection.close()
            return Result("failed", f"{path}: {err!r} {body[:300]!r}")
        if answer.status >= 500 or not _is_ours(answer, content):
            return Result("failed", f"{path}: {answer.status} {content[:200]!r} {body[:300]!r}")
        return Result("accepted" if answer.status < 400 else "refused")

    def close(self) -> None:
        self._connection.close()

    def _post(self, path: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request("POST", path, body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        return answer, answer.read()


def _is_ours(answer: http.client.HTTPResponse, content: bytes) -> bool:
    """The answer is of the kind that it says: JSON, an error object, or events."""
    kind = answer.getheader("content-type") or ""
    if kind.startswith("text/event-stream"):
        return content.endswith(b"data: [DONE]\n\n") and b'"server_error"' not in content
    with contextlib.suppress(ValueError):
        document = json.loads(content)
        return answer.status < 400 or set(document) == {"error"}
    return False


class HttpHeaders:
    """Request lines and headers, one connection each."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def send(self, mutator: Mutator) -> Result:
        body = b'{"prompt": "hello", "max_tokens": 1}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer abc\r\n"
            b"api-key: abc\r\ncontent-type: application/json\r\nx-request-id: an-id\r\n"
            b"x-request-timeout-ms: 60000\r\nx-priority: 1\r\nconnection: close\r\n"
            b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
            b"content-length: " + str(len(body)).encode() + b"\r\n\r\n"
        )
        data = mutator.spoil(head) + body
        result, received = _exchange(self._address, data, patience_s=_PATIENCE_S)
        status = _STATUS.match(received)
        if result is not None:
            return Result(result, repr(data[:400]))
        if status is None:
            return Result("closed")
        code = int(status[1])
        if code >= 500:
            return Result("failed", f"{received[:200]!r} {data[:400]!r}")
        return Result("accepted" if code < 400 else "refused")

    def close(self) -> None:
        """Nothing is kept."""


class GrpcMessages:
    """Messages to every procedure of ``Inference``, over one channel."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])

    def send(self, mutator: Mutator) -> Result:
        method = mutator.random.choice(tuple(MESSAGES))
        data = mutator.message(method)
        streams = method == "Inspect"
        if method == "Generate" and mutator.random.random() < 0.5:
            method, streams = "GenerateStream", True
        path = f"/expertmesh.v1.Inference/{method}"
        try:
            if streams:
                for _ in self._channel.unary_stream(path, bytes, bytes)(data, timeout=WAIT_S):
                    pass
            else:
                self._channel.unary_unary(path, bytes, bytes)(data, timeout=WAIT_S)
        except grpc.RpcError as err:
            code = err.code()
            what = f"{method}: {code} {data[:300]!r}"
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Result("hung", what)
            return Result("failed", what) if code in _BAD_CODES else Result("refused")
        return Result("accepted")

    def close(self) -> None:
        self._channel.close()


class Sockets:
    """First words on every listener: each protocol's own, with a wrong token, spoilt, cut."""

    def __init__(self, target: Target) -> None:
        self._addresses = tuple(target.sockets.values())

    def send(self, mutator: Mutator) -> Result:
        address = mutator.random.choice(self._addresses)
        data = first_words(mutator)
        if mutator.random.random() < 0.8:
            data = mutator.spoil(data)
        result, _ = _exchange(address, data, mutator.random.randint(1, 3))
        return Result(result, repr(data[:300])) if result is not None else Result("closed")

    def close(self) -> None:
        """Nothing is kept."""


def first_words(mutator: Mutator) -> bytes:
    """What a peer says first, as well as it can be said without the token."""
    source = mutator.random
    me = PeerIdentity(
        name="attention-0",
        role="attention",
        rank=0,
        checkpoint_id="checkpoint",
        config_hash="config",
        generation=source.choice((0, 1, 2, 2**31)),
    )
    handshake = ConnectorHandshake(me, "a wrong token")
    hello = handshake.start()
    nonce = source.randbytes(16).hex()
    wrong = TokenProof("a wrong token", "control", is_caller=True, their_nonce=nonce).make_proof()
    frame = FrameHeader(
        FrameKind.ROWS, source.choice((0, 1, 2**31)), 1, length=source.choice((0, 8, 2**31))
    )
    calls: tuple[Callable[[], bytes], ...] = (
        lambda: encode(ControlHello(worker="expert-0", nonce=nonce, release=RELEASE)),
        lambda: (
            encode(ControlHello(worker="expert-0", nonce=nonce, release=RELEASE))
            + encode(ControlProof(proof=wrong))
        ),
        lambda: encode(Register(member=Member(name="expert-0", role="expert", rank=0))),
        lambda: encode(Heartbeat(progress=1, idle=True, generation=2**31)),
        lambda: hello + handshake.feed(hello),
        lambda: frame.encode() + source.randbytes(64),
        lambda: (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
            + source.randbytes(40)
        ),
        lambda: b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + source.randbytes(200),
    )
    return source.choice(calls)()


def _exchange(
    address: Address, data: bytes, num_pieces: int = 1, patience_s: float = 0.0
) -> tuple[Literal["hung"] | None, bytes]:
    """Send, say goodbye, and read to the end: ``hung`` if there is none.

    The goodbye comes ``patience_s`` later, or with the first answer: to HTTP it means that nobody
    waits for one.
    """
    received = b""
    size = max(1, -(-len(data) // num_pieces))
    try:
        with socket.create_connection(address, timeout=WAIT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(data), size):
                connection.sendall(data[start : start + size])
            if patience_s:
                select.select([connection], [], [], patience_s)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65_536):
                received += piece[: 65_536 - len(received)]
    except TimeoutError:
        return "hung", received
    except OSError:
        return None, received  # ended before all was read
    return None, received
