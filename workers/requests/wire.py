"""The engine stream between a gateway replica and one attention worker.

The stream is a bidirectional gRPC call ``METHOD``. Each message is bytes of ``cluster.core.codec``:

    gateway                                      attention worker
    (see ``workers.requests.stream_handshake``)
                                         <-      EngineHello (limits for requests)
    Request, Prefetch, Pause, Abort, Ping,
    SoloStep, KvResync, KeepCopy         ->
                                         <-      Queued, StepOutput, Ping, SoloStep, KvEvents,
                                                 Prefetched, Paused, KvPressure

Gateway and worker must have the same release.
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
"""Path of the engine stream's gRPC call, whose requests and responses are bytes."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Maximum size in bytes of a message on the engine stream, in both directions."""


class EngineHello(Message, frozen=True, kw_only=True):
    """Description of an attention worker and its model, which a gateway needs to check requests."""

    worker: str
    proof: str = ""
    """Proof that the worker knows the cluster token (``workers.requests.stream_handshake``)."""
    generation: int
    max_model_len: int
    """Context limit in tokens; 0 while the weights load."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_kv_tokens: int
    """Number of tokens that the worker's KV blocks hold; 0 while the weights load."""
    dtype: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_attention_layers: int
    """Number of layers with attention maps; other layers (linear attention) have none."""
    num_heads: int
    labels: tuple[str, ...] = ()
    pad_token_id: int | None = None
    """Id of the pad token, which a classifier skips; None if the model has no pad token."""
    problem_type: str = ""
    """Problem type of a classifier (``config.json``); empty if the checkpoint states none."""
    banks: tuple[RouterShape, ...] = ()
    kv_block_size: int = 0
    """Number of tokens of a KV block; 0 if requests do not share cached blocks."""
    kv_length_matters_above: int | None = None
    """Number of prompt tokens above which attention keys depend on the prompt's length (dynamic
    RoPE); None if they never do."""
    keeps_copies: bool = False
    """Whether the worker accepts ``KeepCopy``, because it can keep KV blocks in host memory."""


class Prefetch(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Tells a worker to fetch the KV blocks of a request that will move to this worker.

    The worker ``Request.kv_peer`` has the blocks, or some of a prompt that it still computes.
    ``Prefetched`` is the reply.
    """

    request: Request
    """The request, with the output so far of all its choices, if any."""


class Prefetched(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Reply to ``Prefetch``: all KV blocks of the request that could be fetched have arrived."""

    request_id: str
    attempt: Count


class Pause(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Pauses a request that will move to another worker, once each choice has ``num_tokens``.

    The reply ``Paused`` follows the request's last output on this worker, so that two workers never
    compute the same token. A suspect of crashing workers, which may have to run alone, is not
    paused, and there is no reply.
    """

    request_id: str
    num_tokens: Count = 0
    """Number of tokens, including the prompt, that each choice must have before the pause."""
    is_cancelled: bool = False
    """Whether to resume the request instead of pausing it; a resumed request gets no reply."""


class Paused(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Reply to ``Pause`` and ``Request.pauses``: all outputs of the request were sent, and no step
    computes its rows."""

    request_id: str


class KvPressure(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message of a worker that is short of KV blocks and will soon preempt a request.

    Before the preemption, the gateway can move the request to a worker with free blocks.
    """

    request_id: str
    attempt: Count


class Abort(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message to a worker that ends a request, or some of its choices, without further output."""

    request_id: str
    choices: tuple[int, ...] = ()
    """Indices of the choices to end; empty to end all choices."""


class Ping(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message that the receiver returns unchanged, to show that the engine stream works."""

    number: int


class KvResync(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Message of a gateway that missed ``KvEvents``; the worker replies with all cached blocks."""


class KeepCopy(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """Tells a worker to keep copies of another worker's KV blocks in host memory.

    When it has time, the worker fetches the blocks that it lacks from ``source``. There is no
    reply; ``KvEvents`` later include the received blocks.
    """

    source: str
    """Name of the worker that has the blocks to copy."""
    names: bytes
    """Concatenated hashes of the blocks of one sequence, beginning with its first block."""
    num_prompt: Count
    """Number of blocks in ``names`` that belong to the prompt; they are the first ones."""
    tenant: str = ""
    """Name of the tenant that the sequence belongs to."""
    session: str = ""
    """Name of the tenant's session that the sequence belongs to; empty for none."""
    cache_ttl_s: float | None = None
    priority: int = 0
    may_outlive: bool = True
    """Whether the hashes stay valid after a restart. False for a request with a LoRA adapter, as
    the hashes cover the adapter's key, which is new after each load."""

    def __post_init__(self) -> None:
        if not self.names or len(self.names) % HASH_BYTES:
            raise ValueError(f"names must be hashes of {HASH_BYTES} bytes, not {len(self.names)}")

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The hashes in ``names``, one for each block."""
        ends = range(HASH_BYTES, len(self.names) + 1, HASH_BYTES)
        return tuple(self.names[end - HASH_BYTES : end] for end in ends)


ToEngine: TypeAlias = Request | Prefetch | Pause | Abort | Ping | SoloStep | KvResync | KeepCopy
FromEngine: TypeAlias = (
    Queued | Prefetched | Paused | KvPressure | StepOutput | Ping | SoloStep | KvEvents
)
ENGINE_HELLO: Codec[EngineHello] = Codec(EngineHello, "an engine's hello", HandshakeError)
TO_ENGINE: Codec[ToEngine] = Codec(ToEngine, "a message to an engine")
FROM_ENGINE: Codec[FromEngine] = Codec(FromEngine, "a message of an engine")
