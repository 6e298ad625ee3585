"""Messages on the control sockets between the controller and every worker.

In the first messages both sides prove the cluster token (``cluster.core.proof``) and send their
releases. ``cluster.core.control_codec`` encodes the messages.
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
"""``[bank][expert slot]``: logical expert that is completely loaded there, or ``FREE_SLOT``."""


class AdapterRecord(Message, frozen=True, kw_only=True):
    """A LoRA adapter that workers load, or have loaded."""

    key: str
    """Unique id of this load. Requests and cached prefixes refer to it."""
    name: str
    """Model name that clients use."""
    path: str
    """Folder on the workers' hosts."""
    digest: str = ""
    """Hash of its files; empty until a worker has read them."""
    tenants: tuple[str, ...] = ()
    """Names of the API keys that may use it; empty if every caller may."""


class ControlFrame(Message, frozen=True, kw_only=True, tag_field="kind", tag=True):
    """Base class of all control messages."""


class ControlHello(ControlFrame, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Worker -> controller, first frame: the worker's name.

    Unknown fields are ignored here and in ``ControlChallenge``, so that an error can name the
    release of the peer.
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
    """Worker -> controller: the worker accepts connections and loads weights now."""

    member: Member
    build: Build = Build()
    """Properties that must be equal on all workers."""
    info: dict[str, Any] = field(default_factory=dict)
    """Threads, device, host and kernels; on CUDA also gpu (its name) and gpu_bandwidth_bytes_s."""


class LoadProgress(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: bytes of weights read so far."""

    loaded_bytes: int
    total_bytes: int


class WorkerReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: weights are loaded, and the worker can join a generation."""

    info: dict[str, Any] = field(default_factory=dict)
    """With attention: max_model_len, vocab_size, num_kv_blocks, model_type, dtype, kv_cache_dtype.
    With experts: num_slots, expert_bytes, and device_speed if measured."""


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
    """Counter of the worker's loop iterations. If it stays constant while there is work, the loop
    is stuck."""
    idle: bool
    """Whether the loop waits for work, so that a constant ``progress`` is not a failure."""
    generation: int
    """Number of the newest generation that the worker has entered."""
    running: bool = False
    """Whether it runs steps of that generation."""
    epoch: int = 0
    """Current placement epoch of the worker."""
    waiting: bool = False
    """Whether the loop waits for a peer within a step. Then the peer is the cause if ``progress``
    stays constant."""
    stalled_s: float | None = None
    """Seconds for which a requested or running step has not advanced; None without such a step."""
    waits_for: tuple[str, ...] = ()
    """Names of the workers from which the loop awaits rows, outputs, proposals or a header."""
    fenced: bool = False
    """Whether its lease has expired, so that it has left the generation and awaits the next one."""
    number: int = 0
    """Number of this heartbeat, which the acknowledgement repeats."""
    stats: dict[str, float] = field(default_factory=dict)
    """Gauges and counters by metric name; attention workers: kv_blocks_free, kv_blocks_total."""
    expert_load: LoadReport | None = None
    """Expert load; attention workers send it from time to time, otherwise None."""
    low_disks: tuple[LowDisk, ...] = ()
    """Folders on nearly full disks of its host."""
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that its requests use."""
    problems: tuple[str, ...] = ()
    """Texts about failed components of the worker."""


class Alive(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, between heartbeats: shows that the control thread runs. The controller
    does not reply."""


class HeartbeatAck(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker, reply to each heartbeat; renews the lease."""

    term: int
    """Term of the controller."""
    controller: str = ""
    """Identity of the controller within that term."""
    number: int = 0
    """Number of the acknowledged heartbeat."""


class StatusRequest(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: requests current stats. ``StatusReply`` repeats ``token``."""

    token: int


class StatusReply(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: its current stats."""

    token: int
    stats: dict[str, float] = field(default_factory=dict)
    expert_load: LoadReport | None = None
    """Expert load, always set by attention workers."""


class PeerLost(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: an edge was reset or closed, or a wait on it timed out."""

    worker: str
    """The lost peer's name."""
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
    """Maps of all banks, in the first epoch of the generation."""
    controller: str = ""
    """Identity of the controller in its term. A worker accepts one controller in each term."""
    drained: list[str] = field(default_factory=list)
    """Names of drained workers, so that their end does not count as a death for their requests."""
    places: tuple[str, ...] = ()
    """Names of all places of the cluster, with or without a worker."""


class ControllerSnapshot(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: state that the worker keeps for a restarted controller.

    The worker returns it in ``WorkerReport``. A restarted controller sends this message first, so
    that workers learn its term.
    """

    term: int
    """As in ``NewGeneration``."""
    memory: dict[str, Any]
    """The controller's ``ControllerMemory`` as plain data, which workers do not read."""
    version: int = 0
    """Version of the memory; ``SnapshotKept`` repeats it."""
    controller: str = ""
    """As in ``NewGeneration``."""
    places: tuple[str, ...] = ()
    """As in ``NewGeneration``."""


class SnapshotKept(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``ControllerSnapshot``: the worker has stored it."""

    version: int
    """Version of the snapshot."""


class WorkerReport(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, after ``Register`` and ``WorkerReady`` on a new connection.

    A restarted controller restores its state from the reports of all workers.
    """

    generation: Generation | None
    """Newest generation that was announced to the worker; None before the first."""
    placement: ExpertPlacement | None
    """Newest placement of that generation that the worker has run or received."""
    running: bool
    """Whether the worker runs that generation now, with this placement."""
    highest_step: int
    """Highest step number that the worker has seen."""
    highest_epoch: int
    """Highest placement epoch that the worker has run."""
    known_epoch: int = 0
    """Highest placement epoch in any command it has received. A new epoch must be above it."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Memory of the last ``ControllerSnapshot``."""
    slots: SlotContents = ()
    """Current contents of its expert slots."""


class GenerationReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: edges of this generation are open, and the old step is abandoned."""

    generation: int
    highest_step: int
    """Highest step number that the worker has seen."""
    highest_epoch: int
    """Highest placement epoch that the worker has run."""
    slots: SlotContents = ()
    """Current contents of its expert slots. A running load command may still fill other slots."""


class RunGeneration(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: all members are ready; start steps, beginning with ``first_step``."""

    generation: int
    first_step: int


class LoadExperts(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker with experts: load experts into expert slots in the background.

    No active placement uses these slots; see ``workers/experts/transfer/loading.py``.
    """

    order: int
    """Number of the command; ``ExpertsLoaded`` repeats it."""
    epoch: int = 0
    """The current placement epoch in the controller's view."""
    experts: list[list[int]]
    """Entries ``[bank, expert slot, logical expert]``; the expert ``FREE_SLOT`` empties a slot."""
    source: dict[str, Any] = field(default_factory=dict)
    """``kind`` of the source (default ``checkpoint``) and the parameters of that kind."""


class ExpertsLoaded(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``LoadExperts``: the command has succeeded or failed."""

    order: int
    error: str = ""
    """Why the command failed; empty if all experts are in their slots."""
    num_bytes: int = 0
    """Number of bytes read."""


class KeepAdapters(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker that runs attention: load these adapters, and unload all others.

    A newer command replaces an older one, which then gets no reply.
    """

    number: int
    """Number of the command; ``AdaptersKept`` repeats it."""
    adapters: tuple[AdapterRecord, ...]


class AdaptersKept(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``KeepAdapters``: ready adapters, and errors of the others."""

    number: int
    digests: dict[str, str]
    """Hash of the files by key, for adapters that are ready for requests."""
    errors: dict[str, str] = field(default_factory=dict)
    """Error by key, for adapters that could not be loaded."""


class DrainRequest(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller: the worker asks for a drain, as its process received SIGTERM."""


class Superseded(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, last frame: the worker now follows another controller."""

    term: int
    """Highest term that it has followed."""


class NewEpoch(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: maps of a placement epoch that later steps may use.

    All workers already have its weights in their slots. The current epoch stays active until a step
    header has another epoch.
    """

    generation: int
    """Generation of the epoch. In any other generation the frame is ignored."""
    epoch: int
    """The new epoch, greater than all earlier ones."""
    base_epoch: int
    """The current epoch, whose maps still apply to all banks that are not in ``banks``."""
    banks: tuple[tuple[int, BankPlacement], ...]
    """(index in the placement, maps) of every bank whose maps differ."""


class EpochReady(ControlFrame, frozen=True, kw_only=True):
    """Worker -> controller, reply to ``NewEpoch``: it can run the epoch, or ``error`` is set."""

    generation: int
    epoch: int
    error: str = ""


class SwitchEpoch(ControlFrame, frozen=True, kw_only=True):
    """Controller -> leader: use this epoch in step headers, beginning with the next step."""

    generation: int
    epoch: int
    oldest_epoch: int
    """``StepHeader.oldest_epoch`` of these headers: no later step runs in an older epoch."""


class EpochSwitched(ControlFrame, frozen=True, kw_only=True):
    """Leader -> controller: step ``step`` runs in the epoch, and the step before it has ended."""

    generation: int
    epoch: int
    step: int
    stall_s: float = 0.0
    """Seconds between the end of the step before and this header, if there was work; else 0."""


class Shutdown(ControlFrame, frozen=True, kw_only=True):
    """Controller -> worker: end the process."""

    reason: str = ""
