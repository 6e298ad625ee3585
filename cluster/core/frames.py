"""Messages on the control sockets between the controller and every worker.

The first exchange is a mutual proof of the cluster token (``cluster.core.proof``), and names both
releases. ``cluster.core.control_codec`` has their bytes.
"""

from __future__ import annotations

from typing import Any

from msgspec import field

from cluster.core.codec import Message
from cluster.core.load_report import LoadReport
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.release import Build
from cluster.core.topology import Generation, Member

SlotContents = tuple[tuple[int, ...], ...]
"""``[bank][expert slot]``: the logical expert that is completely loaded there, or ``FREE_SLOT``."""


class AdapterRecord(Message, frozen=True, kw_only=True):
    """One load of an adapter."""

    key: str
    """Identifies this load: requests refer to it, and cached prefixes belong to it."""
    name: str
    """Name that clients use."""
    path: str
    """Folder on the workers' hosts."""
    digest: str = ""
    """Hash of its files; empty before the first worker has read them."""
    tenants: tuple[str, ...] = ()
    """Names of the keys that may use it; empty if every caller may."""


class ControlFrame(Message, frozen=True, kw_only=True, tag_field="kind", tag=True):
    """Base of all control messages."""


class ControlHello(ControlFrame, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Worker -> controller, first frame: the caller's name.

    Fields of other releases are ignored here and in ``ControlChallenge``, so that the error can
    name the release.
    """

    worker: str
    nonce: str
    release: str = ""


class ControlChallenge(ControlFrame, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Controller -> worker: its nonce, and its proof over both nonces."""

    nonce: str
    proof: str
    release: str = ""


class ControlProof(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker's proof over both nonces."""

    proof: str


class Register(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker accepts connections and has begun to load."""

    member: Member
    build: Build = Build()
    """Must equal the build of the other workers."""
    info: dict[str, Any] = field(default_factory=dict)
    """Facts: threads, device, host, kernels; on CUDA gpu, its name, and gpu_bandwidth_bytes_s."""


class LoadProgress(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: weights read so far."""

    loaded_bytes: int
    total_bytes: int


class WorkerReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: weights are loaded, and the worker can join a generation."""

    info: dict[str, Any] = field(default_factory=dict)
    """Attention: max_model_len, vocab_size, num_kv_blocks, model_type, dtype, kv_cache_dtype.
    Expert: bytes."""


class WorkerFailed(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker cannot continue, with the reason."""

    reason: str


class LowDisk(Message, frozen=True, kw_only=True):
    """A folder on a disk that is nearly full."""

    folder: str
    free_bytes: int


class Heartbeat(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, every ``heartbeat_s``."""

    progress: int
    """Grows with every iteration of the worker's loop. If it is constant while there is work, the
    loop is stuck."""
    idle: bool
    """Whether the loop waits for work, so that a constant ``progress`` is not a failure."""
    generation: int
    """Newest generation that the worker follows."""
    running: bool = False
    """Whether it runs steps of that generation."""
    epoch: int = 0
    """Placement epoch of its steps."""
    waiting: bool = False
    """Whether the loop waits for a peer within a step: the peer then causes a constant
    ``progress``."""
    stalled_s: float | None = None
    """Time for which a requested or running step has not advanced; None without such a step."""
    waits_for: tuple[str, ...] = ()
    """Workers for which the loop waits: for rows, outputs, proposals or a header."""
    fenced: bool = False
    """Whether its lease has expired: it has left the generation and waits for the next one."""
    number: int = 0
    """Number of this worker's heartbeat; the acknowledgement repeats it."""
    stats: dict[str, float] = field(default_factory=dict)
    """Gauges and counters by metric name; attention workers: kv_blocks_free, kv_blocks_total."""
    expert_load: LoadReport | None = None
    """Set from time to time by attention workers."""
    low_disks: tuple[LowDisk, ...] = ()
    """Nearly full disks of its host."""
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that its requests use."""
    problems: tuple[str, ...] = ()
    """Descriptions of the parts of the worker that do not work."""


class Alive(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, between heartbeats: the control thread runs. The controller does not
    reply."""


class HeartbeatAck(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker, reply to each heartbeat; renews the lease."""

    term: int
    """Term of the controller."""
    controller: str = ""
    """Identity of the controller within that term."""
    number: int = 0
    """Number of the acknowledged heartbeat."""


class StatusRequest(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: reply with the current stats (``StatusReply`` repeats ``token``)."""

    token: int


class StatusReply(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: its current stats."""

    token: int
    stats: dict[str, float] = field(default_factory=dict)
    expert_load: LoadReport | None = None
    """Always set by attention workers."""


class PeerLost(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: an edge was reset or closed, or a wait on it timed out."""

    worker: str
    """The lost peer's name."""
    generation: int
    reason: str
    is_late: bool = False
    """Whether the edge is intact, but the peer delays the sender in a step."""


class NewGeneration(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: stop the current step and use this membership and these maps."""

    term: int
    """Term of the controller; the worker ignores a lower term than it has seen."""
    generation: Generation
    placement: ExpertPlacement
    """The authoritative epoch."""
    controller: str = ""
    """Identity of the controller within that term; the worker ignores another one of the same term.
    """
    drained: list[str] = field(default_factory=list)
    """Workers that were drained: their former requests did not cause a death."""
    places: tuple[str, ...] = ()
    """All places of the cluster, with or without a worker."""


class ControllerSnapshot(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: state that a restarted controller receives back in ``WorkerReport``.

    It is also a restarted controller's first message; it tells workers the term.
    """

    term: int
    """As in ``NewGeneration``."""
    memory: dict[str, Any]
    """A ``ControllerMemory`` of the controller as plain data; workers only keep it."""
    version: int = 0
    """Version of the memory, which the worker acknowledges."""
    controller: str = ""
    """As in ``NewGeneration``."""
    places: tuple[str, ...] = ()
    """As in ``NewGeneration``."""


class SnapshotKept(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: it keeps this snapshot for the next controller."""

    version: int
    """Version of the snapshot."""


class WorkerReport(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, after ``Register`` and ``WorkerReady`` on a new connection.

    A restarted controller learns from it all that it must know.
    """

    generation: Generation | None
    """The newest that was announced to it; None before the first."""
    placement: ExpertPlacement | None
    """The maps announced with it."""
    running: bool
    """It runs that generation now, with these maps."""
    highest_step: int
    """Highest step number it has seen."""
    highest_epoch: int
    """Highest placement epoch it has run."""
    known_epoch: int = 0
    """Highest placement epoch of any order it has received: a new epoch must be above it."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Memory of the last ``ControllerSnapshot``."""
    slots: SlotContents = ()
    """What its expert slots hold now."""


class GenerationReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: edges of this generation are open, the old step is abandoned."""

    generation: int
    highest_step: int
    """Highest step number it has seen."""
    highest_epoch: int
    """Highest placement epoch it has run."""
    slots: SlotContents = ()
    """What its expert slots hold now; an order under way may still fill others."""


class RunGeneration(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: all members are ready; steps are numbered from ``first_step``."""

    generation: int
    first_step: int


class LoadExperts(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker with experts: fill expert slots in the background.

    The slots are in no placement in force; see ``workers/experts/transfer/loading.py``.
    """

    order: int
    """Number of the order; ``ExpertsLoaded`` repeats it."""
    epoch: int = 0
    """The placement epoch that the controller believes to be in force."""
    experts: list[list[int]]
    """``[bank, expert slot, logical expert]``; ``FREE_SLOT`` for the expert empties the slot."""
    source: dict[str, Any] = field(default_factory=dict)
    """``kind`` of the source, ``checkpoint`` without one, and what that kind needs to know."""


class ExpertsLoaded(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: a load order is carried out, or cannot be."""

    order: int
    error: str = ""
    """Why it cannot be carried out; empty when all experts are in their slots."""
    num_bytes: int = 0
    """Bytes that were read."""


class KeepAdapters(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker that runs attention: have these adapters, and no others.

    A newer order replaces an older one, which is not answered then.
    """

    number: int
    """Number of the order; ``AdaptersKept`` repeats it."""
    adapters: tuple[AdapterRecord, ...]


class AdaptersKept(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``KeepAdapters``: ready adapters, and why others are not."""

    number: int
    digests: dict[str, str]
    """By key, of adapters that are ready for requests."""
    errors: dict[str, str] = field(default_factory=dict)
    """By key, why others cannot be loaded."""


class DrainRequest(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: its process received SIGTERM; drain it first."""


class Superseded(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, the last frame: it follows another controller from now on."""

    term: int
    """Highest term that it has followed."""


class NewEpoch(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: maps of a placement epoch that may come into force.

    The weights for it are in their slots everywhere. The epoch in force stays until a step header
    names another.
    """

    generation: int
    """Generation that it is for; in any other the frame is ignored."""
    epoch: int
    """The epoch, above all before it."""
    base_epoch: int
    """The epoch in force, whose maps hold for the banks that are not among ``banks``."""
    banks: tuple[tuple[int, BankPlacement], ...]
    """(place in the placement, maps) of every bank whose maps differ."""


class EpochReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: it could run steps in the epoch, or why not."""

    generation: int
    epoch: int
    error: str = ""


class SwitchEpoch(ControlFrame, frozen=True, kw_only=True):
    """Controller -> leader: headers name this epoch from the next step on, be it an empty one."""

    generation: int
    epoch: int
    oldest_epoch: int
    """Oldest epoch of the header: no step runs in an older one any more."""


class EpochSwitched(ControlFrame, frozen=True, kw_only=True):
    """Leader -> controller: the header of ``step`` names the epoch; the step before is over."""

    generation: int
    epoch: int
    step: int
    stall_s: float = 0.0
    """Time between the end of the step before and this header, where there was work."""


class Shutdown(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: end yourself."""

    reason: str = ""
