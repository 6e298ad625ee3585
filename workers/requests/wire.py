"""The engine stream between a gateway replica and one attention worker.

One gRPC stream ``METHOD`` of bytes in both directions, each a message of ``cluster.core.codec``:

    gateway                                      attention worker
    (see ``workers.requests.stream_handshake``)
                                         <-      EngineHello (what requests may ask for)
    Request, Prefetch, Pause, Abort, Ping,
    SoloStep, KvResync, KeepCopy         ->
                                         <-      Queued, StepOutput, Ping, SoloStep, KvEvents,
                                                 Prefetched, Paused, Relieve

Both ends are of one release.
"""

from __future__ import annotations

from typing import TypeAlias

from cluster.core.codec import Codec, Count, Message
from cluster.core.errors import HandshakeError
from workers.requests.block_hash import HASH_BYTES, BlockHash, KvEvents
from workers.requests.inspection import RouterShape
from workers.requests.request import Queued, Request, SoloStep, StepOutput

SERVICE = "expertmesh.v1.Engine"
METHOD = "Stream"
PATH = f"/{SERVICE}/{METHOD}"
"""Path of the gRPC call; requests and answers are bytes."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Longest message in either direction."""


class EngineHello(Message, frozen=True, kw_only=True):
    """What a gateway must know before it can validate a request."""

    worker: str
    proof: str = ""
    """See ``workers.requests.stream_handshake``."""
    generation: int
    max_model_len: int
    """Context limit in tokens; 0 while the weights load."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_kv_tokens: int
    """Tokens that the whole KV pool holds; 0 while the weights load."""
    dtype: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_layers: int
    """See ``ModelShape``."""
    num_heads: int
    labels: tuple[str, ...] = ()
    pad_token_id: int | None = None
    """Token that a classifier does not take for the last one."""
    problem_type: str = ""
    """A classifier's kind of labels; empty where the checkpoint names none."""
    banks: tuple[RouterShape, ...] = ()
    kv_block_size: int = 0
    """Tokens of a KV block; 0: requests share none."""
    kv_length_matters_above: int | None = None
    """See ``ModelConfig.length_matters_above``."""
    keeps_copies: bool = False
    """It takes ``KeepCopy``: it has host memory for KV blocks."""


class Prefetch(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A request that decodes at its ``kv_peer`` will move here: fetch its KV blocks now.

    The other worker goes on meanwhile. ``Prefetched`` is the answer.
    """

    request: Request
    """With the output so far of all its choices."""


class Prefetched(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """The blocks that a ``Prefetch`` asked for are here, as far as they could be fetched."""

    request_id: str
    attempt: Count


class Pause(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A request is about to leave for another worker. Once each of its choices has ``num_tokens``,
    no further step runs rows of it.

    ``Paused`` is the answer, after the last of its outputs. So the other worker need not compute a
    token that is already being computed here. A request that may be about to run alone goes on,
    without an answer.
    """

    request_id: str
    num_tokens: Count = 0
    """With the prompt."""
    is_over: bool = False
    """It stays after all, and goes on; without an answer."""


class Paused(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """All outputs of the request were sent, and no step computes more."""

    request_id: str


class Relieve(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """The worker runs out of KV blocks, and would soon preempt this request.

    It does so unless another worker has room, to which the gateway moves the request.
    """

    request_id: str
    attempt: Count


class Abort(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Ends a request, or some of its choices."""

    request_id: str
    choices: tuple[int, ...] = ()
    """None named: all."""


class Ping(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Comes back as it was sent."""

    number: int


class KvResync(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A gateway missed ``KvEvents``: the worker answers with all blocks."""


class KeepCopy(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Another worker has computed blocks that are wanted later: keep copies in host memory.

    There is no answer: ``KvEvents`` name the blocks that have come. The worker reads those that it
    lacks from ``source``, when it can.
    """

    source: str
    """Name of the worker that has the blocks."""
    names: bytes
    """Hashes of the blocks of one sequence, from its first on, joined."""
    num_prompt: Count
    """Blocks of them that the prompt had."""
    tenant: str = ""
    """Whose they are."""
    session: str = ""
    """As in ``Request``, like the next two."""
    cache_ttl_s: float | None = None
    priority: int = 0
    may_outlive: bool = True
    """Whether the hashes mean the same after a restart; those of adapters do not."""

    def __post_init__(self) -> None:
        if not self.names or len(self.names) % HASH_BYTES:
            raise ValueError(f"names must be hashes of {HASH_BYTES} bytes, not {len(self.names)}")

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The hashes one by one."""
        ends = range(HASH_BYTES, len(self.names) + 1, HASH_BYTES)
        return tuple(self.names[end - HASH_BYTES : end] for end in ends)


ToEngine: TypeAlias = Request | Prefetch | Pause | Abort | Ping | SoloStep | KvResync | KeepCopy
FromEngine: TypeAlias = (
    Queued | Prefetched | Paused | Relieve | StepOutput | Ping | SoloStep | KvEvents
)
ENGINE_HELLO: Codec[EngineHello] = Codec(EngineHello, "an engine's hello", HandshakeError)
TO_ENGINE: Codec[ToEngine] = Codec(ToEngine, "a message to an engine")
FROM_ENGINE: Codec[FromEngine] = Codec(FromEngine, "a message of an engine")
