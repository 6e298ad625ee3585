"""Messages on the control sockets between the controller and every worker.

Frame: 4 bytes big-endian length, then that many bytes of JSON ``{"kind": ..., ...}``. Nothing is
unpickled. The first exchange is a mutual proof of the cluster token (``hmac`` over both nonces).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ProtocolError

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Largest control frame: a placement of 62 layers x 128 experts x 64 devices takes 3 MB."""
MAX_HELLO_BYTES = 4096
"""Largest frame before the peer has proved that it knows the token."""
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlFrame:
    """Base of all control messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlHello(ControlFrame):
    """Worker -> controller, first frame: who is calling."""

    worker: str
    nonce: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlChallenge(ControlFrame):
    """Controller -> worker: its nonce, and its proof over both."""

    nonce: str
    proof: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlProof(ControlFrame):
    """Worker -> controller: the worker's proof over both nonces."""

    proof: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Register(ControlFrame):
    """Worker -> controller: it listens, and has begun to load."""

    member: dict[str, Any]
    """``cluster.topology.Member`` as a dict."""
    info: dict[str, Any] = field(default_factory=dict)
    """Facts for people: threads, device, host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadProgress(ControlFrame):
    """Worker -> controller: weights read so far."""

    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReady(ControlFrame):
    """Worker -> controller: weights are in memory, it can join a generation."""

    info: dict[str, Any] = field(default_factory=dict)
    """Attention: max_model_len, vocab_size, num_kv_blocks, model_type, dtype. Expert: bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFailed(ControlFrame):
    """Worker -> controller: it cannot go on, in its own words."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat(ControlFrame):
    """Worker -> controller, every ``heartbeat_s``."""

    progress: int
    """Grows whenever the worker's loop turns; standing still with work in hand is a stuck loop."""
    idle: bool
    """The loop waits for work, so that a standing ``progress`` is no failure."""
    generation: int
    """Newest generation it follows."""
    waiting: bool = False
    """The loop waits for a peer within a step: a standing ``progress`` is the peer's doing."""
    fenced: bool = False
    """Its lease ran out: it has left the generation and waits for the next one."""
    number: int = 0
    """Counts this worker's heartbeats; the acknowledgement brings it back."""
    stats: dict[str, float] = field(default_factory=dict)
    """Gauges and counters by metric name; attention workers: kv_blocks_free, kv_blocks_total."""
    expert_load: dict[str, Any] = field(default_factory=dict)
    """Attention workers, now and then: a ``cluster.load_report.LoadReport`` as a dict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatAck(ControlFrame):
    """Controller -> worker, answers each heartbeat: it is alive, the lease goes on."""

    term: int
    """Term of the controller."""
    controller: str = ""
    """Which controller of that term."""
    number: int = 0
    """The heartbeat's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusRequest(ControlFrame):
    """Controller -> worker: answer with a heartbeat now (``token`` comes back in StatusReply)."""

    token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusReply(ControlFrame):
    """Worker -> controller: its numbers at this moment."""

    token: int
    stats: dict[str, float] = field(default_factory=dict)
    expert_load: dict[str, Any] = field(default_factory=dict)
    """As in ``Heartbeat``, always."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerLost(ControlFrame):
    """Worker -> controller: an edge was reset or closed, or a wait on it timed out."""

    worker: str
    """The lost peer's name."""
    generation: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NewGeneration(ControlFrame):
    """Controller -> worker: stop the current step, take this membership and these maps."""

    term: int
    """Term of the controller; a lower one than seen before is not followed."""
    generation: dict[str, Any]
    """``cluster.topology.Generation`` as a dict."""
    placement: dict[str, Any]
    """``cluster.placement.ExpertPlacement`` as a dict: the authoritative epoch."""
    controller: str = ""
    """Which controller of that term; another one of the same term is not followed."""
    drained: list[str] = field(default_factory=list)
    """Workers that have left on purpose: nobody died of what ran with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keepsake(ControlFrame):
    """Controller -> worker: what a restarted controller is to be told in ``Rejoin``.

    It is also the first thing that a restarted controller says: from then on its term is known.
    """

    term: int
    """As in ``NewGeneration``."""
    memory: dict[str, Any]
    """As ``cluster.adoption`` makes and reads it; nothing to the worker."""
    controller: str = ""
    """As in ``NewGeneration``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejoin(ControlFrame):
    """Worker -> controller, after ``Register`` and ``WorkerReady`` on a new connection.

    A restarted controller learns from it all that it must know.
    """

    term: int
    """Highest term of a controller that it has followed."""
    generation: dict[str, Any]
    """``Generation`` as a dict: the newest that was announced to it; empty before the first."""
    placement: dict[str, Any]
    """The maps announced with it."""
    running: bool
    """It runs that generation now."""
    highest_step: int
    """Highest step number it has seen."""
    highest_epoch: int
    """Highest placement epoch it has run."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Of the last ``Keepsake``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationReady(ControlFrame):
    """Worker -> controller: edges of this generation are open, the old step is abandoned."""

    generation: int
    highest_step: int
    """Highest step number it has seen."""
    highest_epoch: int
    """Highest placement epoch it has run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunGeneration(ControlFrame):
    """Controller -> worker: all members are ready; steps are numbered from ``first_step``."""

    generation: int
    first_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadExperts(ControlFrame):
    """Controller -> worker with experts: fill expert slots in the background.

    The slots are in no placement in force; see ``workers/experts/loading.py``.
    """

    order: int
    """Number of the order; comes back in ``ExpertsLoaded``."""
    experts: list[list[int]]
    """``[bank, expert slot, logical expert]``; ``FREE_SLOT`` for the expert empties the slot."""
    source: dict[str, Any] = field(default_factory=dict)
    """``kind`` of the source, ``checkpoint`` without one, and what that kind needs to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsLoaded(ControlFrame):
    """Worker -> controller: a load order is carried out, or cannot be."""

    order: int
    error: str = ""
    """What is in the way, in the worker's words; empty when all experts are in their slots."""
    num_bytes: int = 0
    """Bytes that were read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainWish(ControlFrame):
    """Worker -> controller: its process was told to end (SIGTERM); drain it first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEpoch(ControlFrame):
    """Controller -> worker: maps of a placement epoch that may come into force.

    The weights for it are in their slots everywhere. The epoch in force stays until a step header
    names another.
    """

    generation: int
    """Generation that it is for; in any other it means nothing."""
    epoch: int
    """The epoch, above all before it."""
    base_epoch: int
    """The epoch in force, whose maps hold for the banks that are not among ``banks``."""
    banks: list[list[Any]]
    """``[place in the placement, BankPlacement as a dict]`` of every bank whose maps differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReady(ControlFrame):
    """Worker -> controller: it could run steps in the epoch, or what is in the way."""

    generation: int
    epoch: int
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchEpoch(ControlFrame):
    """Controller -> leader: headers name this epoch from the next step on, be it an empty one."""

    generation: int
    epoch: int
    oldest_epoch: int
    """As in the header: no step runs in an older one any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochSwitched(ControlFrame):
    """Leader -> controller: the header of ``step`` names the epoch; the step before is over."""

    generation: int
    epoch: int
    step: int
    stall_s: float = 0.0
    """Time between the end of the step before and this header, where there was work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shutdown(ControlFrame):
    """Controller -> worker: end yourself."""

    reason: str = ""


FRAMES: dict[str, type[ControlFrame]] = {
    kind.__name__: kind
    for kind in (
        ControlHello,
        ControlChallenge,
        ControlProof,
        Register,
        LoadProgress,
        WorkerReady,
        WorkerFailed,
        Heartbeat,
        HeartbeatAck,
        StatusRequest,
        StatusReply,
        PeerLost,
        NewGeneration,
        Keepsake,
        Rejoin,
        GenerationReady,
        RunGeneration,
        LoadExperts,
        ExpertsLoaded,
        DrainWish,
        NewEpoch,
        EpochReady,
        SwitchEpoch,
        EpochSwitched,
        Shutdown,
    )
}
"""Every message by the name it has on the wire."""


def encode(frame: ControlFrame) -> bytes:
    """One frame, ready to be sent."""
    body: dict[str, Any] = {"kind": type(frame).__name__}
    for entry in dataclasses.fields(frame):
        body[entry.name] = getattr(frame, entry.name)
    data = json.dumps(body, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def frame_length(prefix: bytes, limit: int = MAX_FRAME_BYTES) -> int:
    """Length of the frame that ``prefix`` (4 bytes) announces. Raises ``ProtocolError``."""
    length: int = _LENGTH.unpack(prefix)[0]
    if not 0 < length <= limit:
        raise ProtocolError(f"control frame of {length} bytes: must be 1 to {limit}")
    return length


def decode(data: bytes) -> ControlFrame:
    """Read one frame's JSON. Raises ``ProtocolError`` on anything that is not one of ours."""
    try:
        body: Mapping[str, Any] = json.loads(data)
        values = dict(body)
        kind = FRAMES[values.pop("kind")]
        names = {f.name: f for f in dataclasses.fields(kind)}
        if not set(values) <= set(names):
            raise ValueError(f"unknown fields {sorted(set(values) - set(names))}")
        for name, value in values.items():
            if not _fits(names[name].type, value):
                raise ValueError(f"{name} must be {names[name].type}")
        return kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ProtocolError(f"not a control frame: {err}") from err


def proof(token: str, side: str, worker_nonce: str, controller_nonce: str) -> str:
    """What a side (``worker`` or ``controller``) sends to show that it knows the token."""
    text = f"expertmesh-control|{side}|{worker_nonce}|{controller_nonce}"
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def _fits(annotation: object, value: object) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {"int": int, "str": str, "bool": bool}
    text = str(annotation)
    for container in (dict, list):
        if text.startswith(container.__name__):
            return isinstance(value, container)
    if text == "int" and isinstance(value, bool):
        return False
    return isinstance(value, kinds.get(text, object))
