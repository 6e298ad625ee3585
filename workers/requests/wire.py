"""The engine stream between a gateway replica and one attention worker.

It is a bidirectional gRPC call ``METHOD``. Each of its messages is bytes of ``cluster.core.codec``:

    gateway                                      attention worker
    (see ``workers.requests.stream_handshake``)
                                         <-      EngineHello (limits for requests)
    Request, Prefetch, Pause, Abort, Ping,
    SoloStep, KvResync, KeepCopy         ->
                                         <-      Queued, StepOutput, Ping, SoloStep, KvEvents,
                                                 Prefetched, Paused, KvPressure

Both ends must be of the same release.
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
"""Path of the gRPC call, whose requests and responses are bytes."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Maximum message size in both directions."""


class EngineHello(Message, frozen=True, kw_only=True):
    """Facts that a gateway needs to validate a request."""

    worker: str
    proof: str = ""
    """See ``workers.requests.stream_handshake``."""
    generation: int
    max_model_len: int
    """Context limit in tokens; 0 while the weights load."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_kv_tokens: int
    """Number of tokens that the KV pool holds; 0 while the weights load."""
    dtype: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_layers: int
    """See ``ModelShape``."""
    num_heads: int
    labels: tuple[str, ...] = ()
    pad_token_id: int | None = None
    """Pad token, which a classifier skips; None if there is none."""
    problem_type: str = ""
    """A classifier's problem type; empty if the checkpoint has none."""
    banks: tuple[RouterShape, ...] = ()
    kv_block_size: int = 0
    """Number of tokens of a KV block; 0 if requests share no blocks."""
    kv_length_matters_above: int | None = None
    """See ``ModelConfig.length_matters_above``."""
    keeps_copies: bool = False
    """Whether the worker accepts ``KeepCopy``, as it keeps KV blocks in host memory."""


class Prefetch(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Tells a worker to fetch the KV blocks of a request that will move to it.

    The request's ``kv_peer`` has the blocks and continues to decode. ``Prefetched`` is the reply.
    """

    request: Request
    """The request, with the output so far of all its choices."""


class Prefetched(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Reply to ``Prefetch``: all blocks that could be fetched have arrived."""

    request_id: str
    attempt: Count


class Pause(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Pauses a request that will move to another worker, once each choice has ``num_tokens``.

    The reply ``Paused`` follows the request's last output, so that both workers never compute the
    same token. If the request may be about to run alone, it is not paused and there is no reply.
    """

    request_id: str
    num_tokens: Count = 0
    """Number of tokens of a choice, including the prompt."""
    is_cancelled: bool = False
    """Whether to resume the request instead of pausing it; there is no reply."""


class Paused(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Reply to ``Pause``: all outputs of the request have been sent, and no step computes more."""

    request_id: str


class KvPressure(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """The worker is short of KV blocks and will soon preempt this request.

    Before that, the gateway can move the request to a worker with free blocks.
    """

    request_id: str
    attempt: Count


class Abort(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Ends a request, or some of its choices."""

    request_id: str
    choices: tuple[int, ...] = ()
    """Choices to end; empty for all."""


class Ping(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message that the receiver returns unchanged."""

    number: int


class KvResync(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Sent by a gateway that missed ``KvEvents``; the worker replies with all blocks."""


class KeepCopy(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Tells a worker to keep copies of another worker's blocks in host memory.

    When it has time, the worker fetches the blocks that it lacks from ``source``. There is no
    reply; ``KvEvents`` later include the received blocks.
    """

    source: str
    """Name of the worker that has the blocks."""
    names: bytes
    """Concatenated hashes of the blocks of one sequence, beginning with its first block."""
    num_prompt: Count
    """Number of these blocks that belong to the prompt."""
    tenant: str = ""
    """Tenant of the sequence."""
    session: str = ""
    """As in ``Request``; so are ``cache_ttl_s`` and ``priority``."""
    cache_ttl_s: float | None = None
    priority: int = 0
    may_outlive: bool = True
    """Whether the hashes stay valid after a restart. With an adapter they do not."""

    def __post_init__(self) -> None:
        if not self.names or len(self.names) % HASH_BYTES:
            raise ValueError(f"names must be hashes of {HASH_BYTES} bytes, not {len(self.names)}")

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The hashes in ``names``, one by one."""
        ends = range(HASH_BYTES, len(self.names) + 1, HASH_BYTES)
        return tuple(self.names[end - HASH_BYTES : end] for end in ends)


ToEngine: TypeAlias = Request | Prefetch | Pause | Abort | Ping | SoloStep | KvResync | KeepCopy
FromEngine: TypeAlias = (
    Queued | Prefetched | Paused | KvPressure | StepOutput | Ping | SoloStep | KvEvents
)
ENGINE_HELLO: Codec[EngineHello] = Codec(EngineHello, "an engine's hello", HandshakeError)
TO_ENGINE: Codec[ToEngine] = Codec(ToEngine, "a message to an engine")
FROM_ENGINE: Codec[FromEngine] = Codec(FromEngine, "a message of an engine")
