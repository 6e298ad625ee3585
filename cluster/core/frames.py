"""Messages on the control sockets between the controller and every worker.

In the first messages both sides prove that they know the cluster token (``cluster.core.proof``),
and send their releases. ``cluster.core.control_codec`` encodes the messages.
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
"""Logical experts that are completely loaded in a worker's expert slots, as
``[bank][expert slot]``; ``FREE_SLOT`` for a slot without one."""


class AdapterRecord(Message, frozen=True, kw_only=True):
    """A LoRA adapter that workers load, or have loaded."""

    key: str
    """Unique id of this load of the adapter. Requests and cached prefixes refer to it."""
    name: str
    """Model name with which clients select the adapter."""
    path: str
    """Folder of the adapter on the workers' hosts."""
    digest: str = ""
    """Hash of the adapter's files; empty until a worker has read them."""
    tenants: tuple[str, ...] = ()
    """Names of the API keys that may use the adapter; empty if every caller may."""


class ControlFrame(Message, frozen=True, kw_only=True, tag_field="kind", tag=True):
    """Base class of all control messages."""


class ControlHello(ControlFrame, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Worker -> controller, first frame: the worker's name.

    Unknown fields are ignored in this class and in ``ControlChallenge``, so that an error can name
    the release of the peer.
    """

    worker: str
    nonce: str
    release: str = ""


class ControlChallenge(ControlFrame, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Controller -> worker: the controller's nonce, and its proof over both nonces that it knows
    the cluster token."""

    nonce: str
    proof: str
    release: str = ""


class ControlProof(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker's proof over both nonces that it knows the cluster token."""

    proof: str


class Register(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker accepts connections and begins to load weights."""

    member: Member
    build: Build = Build()
    """Properties of the worker's program and configuration that must be equal on all workers."""
    info: dict[str, Any] = field(default_factory=dict)
    """Threads, device, host and kernels of the worker; on CUDA also gpu (its name) and
    gpu_bandwidth_bytes_s."""


class LoadProgress(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: number of bytes of weights that the worker has read so far."""

    loaded_bytes: int
    total_bytes: int


class WorkerReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: weights are loaded, and the worker can join a generation."""

    info: dict[str, Any] = field(default_factory=dict)
    """Properties of the worker. With attention: max_model_len, vocab_size, num_kv_blocks,
    model_type, dtype, kv_cache_dtype. With experts: num_slots, expert_bytes, and device_speed if
    measured."""


class WorkerFailed(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker cannot continue, with the reason."""

    reason: str


class LowDisk(Message, frozen=True, kw_only=True):
    """A folder on a disk that is nearly full."""

    folder: str
    free_bytes: int


class Heartbeat(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, every ``heartbeat_s``: sign of life, with the state of the worker."""

    progress: int
    """Counter of loop iterations and of progress within steps of the worker's data thread. If the
    counter stays constant while there is work, the thread is stuck."""
    idle: bool
    """Whether the data thread waits for work, so that a constant ``progress`` is not a failure."""
    generation: int
    """Number of the newest generation that the worker has entered."""
    running: bool = False
    """Whether the worker runs steps of the generation ``generation``."""
    epoch: int = 0
    """Current placement epoch of the worker."""
    waiting: bool = False
    """Whether the data thread waits for a peer within a step. If so, the peer is the cause if
    ``progress`` stays constant."""
    stalled_s: float | None = None
    """Seconds for which a requested or running step has not advanced; None without such a step."""
    waits_for: tuple[str, ...] = ()
    """Names of the workers from which the data thread awaits rows, outputs, proposals or a
    header."""
    fenced: bool = False
    """Whether the worker's lease has expired, so that it has left the generation and awaits the
    next one."""
    number: int = 0
    """Number of this heartbeat, which the acknowledgement repeats."""
    stats: dict[str, float] = field(default_factory=dict)
    """Gauges and counters by metric name; attention workers: kv_blocks_free, kv_blocks_total."""
    expert_load: LoadReport | None = None
    """Expert load, which attention workers send with some heartbeats; otherwise None."""
    low_disks: tuple[LowDisk, ...] = ()
    """Folders on nearly full disks of the worker's host."""
    adapters: tuple[str, ...] = ()
    """Keys of the LoRA adapters that the worker's requests use."""
    problems: tuple[str, ...] = ()
    """Texts about failed components of the worker."""


class Alive(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, between two heartbeats: sign of life without a reply."""


class HeartbeatAck(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker, reply to each heartbeat; renews the lease."""

    term: int
    """Term of the controller."""
    controller: str = ""
    """Identity of the controller process, as two of them may claim one term."""
    number: int = 0
    """Number of the acknowledged heartbeat."""


class StatusRequest(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: requests current stats. ``StatusReply`` repeats ``token``."""

    token: int
    has_load: bool = True
    """Whether attention workers reply with their expert load, too."""


class StatusReply(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``StatusRequest``: the worker's current stats."""

    token: int
    stats: dict[str, float] = field(default_factory=dict)
    expert_load: LoadReport | None = None
    """Expert load of an attention worker, if requested; None from other workers."""


class PeerLost(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: an edge to another worker was reset or closed, or a wait on it timed
    out."""

    worker: str
    """Name of the lost peer."""
    generation: int
    reason: str
    is_late: bool = False
    """Whether the edge is intact, but the peer delays the sender in a step."""


class NewGeneration(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: stop the current step, and use this membership and placement."""

    term: int
    """Term of the controller. A worker ignores a term below the highest that it has seen."""
    generation: Generation
    placement: ExpertPlacement
    """Expert placement of all banks, in the first epoch of the generation."""
    controller: str = ""
    """Identity of the controller process. A worker accepts only one controller in each term."""
    drained: list[str] = field(default_factory=list)
    """Names of drained workers, so that their end does not count as a death for their requests."""
    places: tuple[str, ...] = ()
    """Names of all places of the cluster (numbered positions for workers), with or without a
    worker."""


class ControllerSnapshot(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: state that the worker keeps for a restarted controller.

    The worker returns the state in ``WorkerReport``. A restarted controller sends this message
    first, so that workers learn its term.
    """

    term: int
    """Term of the controller. A worker ignores a term below the highest that it has seen."""
    memory: dict[str, Any]
    """The controller's ``ControllerMemory`` as plain data, which workers do not read."""
    version: int = 0
    """Version of ``memory``; ``SnapshotKept`` repeats it."""
    controller: str = ""
    """Identity of the controller process. A worker accepts only one controller in each term."""
    places: tuple[str, ...] = ()
    """Names of all places of the cluster (numbered positions for workers), with or without a
    worker."""


class SnapshotKept(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``ControllerSnapshot``: the worker has stored the snapshot."""

    version: int
    """Version of the stored snapshot."""


class WorkerReport(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, after ``Register`` and ``WorkerReady`` on a new connection.

    A restarted controller restores its state from the reports of all workers.
    """

    generation: Generation | None
    """Newest generation that was announced to the worker; None before the first generation."""
    placement: ExpertPlacement | None
    """Newest placement of ``generation`` that the worker has run or received; None before the first
    generation."""
    running: bool
    """Whether the worker currently runs ``generation`` with ``placement``."""
    highest_step: int
    """Highest step number that the worker has seen."""
    highest_epoch: int
    """Highest placement epoch that the worker has run."""
    known_epoch: int = 0
    """Highest placement epoch in any command that the worker has received. A new epoch must be
    above it."""
    memory: dict[str, Any] = field(default_factory=dict)
    """The controller's memory from the last ``ControllerSnapshot``; empty before the first."""
    slots: SlotContents = ()
    """Current contents of the worker's expert slots."""


class GenerationReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the edges of the new generation are open, and the worker's step of the
    old one is abandoned."""

    generation: int
    highest_step: int
    """Highest step number that the worker has seen."""
    highest_epoch: int
    """Highest placement epoch that the worker has run."""
    slots: SlotContents = ()
    """Current contents of the worker's expert slots. A running load command may still fill other
    slots."""


class RunGeneration(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: all members are ready; run steps from ``first_step`` on."""

    generation: int
    first_step: int


class LoadExperts(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker with experts: load experts into expert slots in the background.

    No active placement uses these slots; see ``workers/experts/transfer/loading.py``.
    """

    order: int
    """Number of the command; ``ExpertsLoaded`` repeats it."""
    epoch: int = 0
    """Placement epoch that is current in the controller's view."""
    experts: list[list[int]]
    """Entries ``[bank, expert slot, logical expert]``; the expert ``FREE_SLOT`` empties a slot."""
    source: dict[str, Any] = field(default_factory=dict)
    """``kind`` of the source of weights (default ``checkpoint``) and the parameters of this
    kind."""


class ExpertsLoaded(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``LoadExperts``: the command has succeeded or failed."""

    order: int
    error: str = ""
    """Why the load command failed; empty if all experts are in their slots."""
    num_bytes: int = 0
    """Number of bytes of weights that the worker read for the command."""


class KeepAdapters(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker that runs attention: load these LoRA adapters, and unload all others.

    A newer command replaces an older one, which then gets no reply.
    """

    number: int
    """Number of the command; ``AdaptersKept`` repeats it."""
    adapters: tuple[AdapterRecord, ...]


class AdaptersKept(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``KeepAdapters``: which LoRA adapters are ready, and errors of
    the others."""

    number: int
    digests: dict[str, str]
    """Hash of the files, by adapter key, for adapters that are ready for requests."""
    errors: dict[str, str] = field(default_factory=dict)
    """Error text, by adapter key, for adapters that could not be loaded."""


class DrainRequest(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker asks for a drain, as its process received SIGTERM."""


class Superseded(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, last frame: the worker now follows another controller."""

    term: int
    """Highest term that the worker has followed."""


class NewEpoch(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: expert maps of a placement epoch that later steps may use.

    All workers already have the weights of the epoch in their slots. The current epoch stays active
    until a step header has another epoch.
    """

    generation: int
    """Generation in which the epoch is valid. A worker in any other generation ignores the
    frame."""
    epoch: int
    """Number of the new placement epoch, greater than all earlier ones."""
    base_epoch: int
    """Number of the current placement epoch; its maps still apply to all banks that are not in
    ``banks``."""
    banks: tuple[tuple[int, BankPlacement], ...]
    """(index in the placement, maps) of every bank that has other maps than in ``base_epoch``."""


class EpochReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``NewEpoch``: the worker can run the epoch, or ``error`` says
    why not."""

    generation: int
    epoch: int
    error: str = ""


class SwitchEpoch(ControlFrame, frozen=True, kw_only=True):
    """Controller -> leader: use this placement epoch in all step headers from now on."""

    generation: int
    epoch: int
    oldest_epoch: int
    """Value of ``StepHeader.oldest_epoch`` from the next step on: no later step runs in an older
    epoch."""


class EpochSwitched(ControlFrame, frozen=True, kw_only=True):
    """Leader -> controller: step ``step`` is the first in the placement epoch, and the step before
    it has ended."""

    generation: int
    epoch: int
    step: int
    stall_s: float = 0.0
    """Seconds from the end of the previous step to the header of ``step``; 0 without work."""


class Shutdown(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: end the worker's process."""

    reason: str = ""
