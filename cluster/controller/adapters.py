"""Adapters: makes all attention workers load the same adapters, which requests can then name.

    load ─▶ LOADING ─▶ all workers have it ─▶ READY ─▶ unload ─▶ UNLOADING
        ─▶ no request has used it for a while ─▶ workers free it

A new worker joins once it has all adapters that it can load. Requests for an adapter that it cannot
load go to other workers, and it retries every ``RETRY_S``. A command lists all adapters that a
worker must have, so any controller, also a restarted one, can send it at any time.
"""

from __future__ import annotations

from typing import Any

from cluster.config.cluster import ClusterConfig
from cluster.config.lora import (
    MAX_PATH,
    MAX_TENANT,
    MAX_TENANTS,
    NAME_RULE,
    LoraSection,
    are_valid_tenants,
    is_folder_path,
    is_valid_name,
)
from cluster.controller.adapter_uses import AdapterUses
from cluster.controller.cluster import Cluster
from cluster.controller.controller_memory import KeptAdapter
from cluster.controller.workers import WorkerRecord
from cluster.core.codec import Message
from cluster.core.errors import ConflictError, ModelNotFoundError, RequestError
from cluster.core.frames import AdaptersKept, KeepAdapters
from cluster.core.states import AdapterState, ClusterState, WorkerState

LOAD_LIMIT_S = 120.0
"""Time limit for all workers to load an adapter, and for a new worker to load all adapters."""
_KEPT_ERRORS = 64
UNUSED_S = 5.0
"""Time without requests after which an unloaded adapter is freed. Requests of a lost worker may
still be moving to another worker."""


RETRY_S = 30.0
"""Time between two attempts of a worker to load an adapter that it could not load."""


class AdapterUnloadCommand(Message, frozen=True, kw_only=True):
    """A client's command to unload an adapter."""

    name: str


class AdapterLoadCommand(Message, frozen=True, kw_only=True):
    """A client's command to load an adapter."""

    name: str
    path: str
    tenants: tuple[str, ...] = ()
    """Names of the keys that may use the adapter; if empty, every caller may."""

    def check(self, config: ClusterConfig) -> None:
        """Raise ``RequestError`` if the configuration does not allow such an adapter."""
        if not is_valid_name(self.name):
            raise RequestError(f"lora_name ({self.name[:128]!r}) {NAME_RULE}", "lora_name")
        if why := self._path_error(config.lora):
            raise RequestError(f"lora_path ({self.path[:128]!r}) {why}", "lora_path")
        if why := self._tenants_error(config.gateway.requires_keys):
            raise RequestError(f"tenants ({len(self.tenants)} of them) {why}", "tenants")
        if self.name == config.model.served_model_name:
            raise RequestError(f"lora_name ({self.name}) is the name of the model", "lora_name")

    def _path_error(self, lora: LoraSection) -> str:
        """Reason why the path is not allowed; empty if it is."""
        if not is_folder_path(self.path):
            return f"must be an absolute path of at most {MAX_PATH} characters"
        if lora.allows_path(self.path):
            return ""
        roots = ", ".join(lora.roots) or "none is named"
        return f"must be in a folder of --lora-roots, without '..' ({roots})"

    def _tenants_error(self, has_keys: bool) -> str:
        """Reason why the tenants are not allowed; empty if they are."""
        if not are_valid_tenants(self.tenants):
            return f"must be at most {MAX_TENANTS} names of at most {MAX_TENANT} characters"
        if not self.tenants or has_keys:
            return ""
        return "need api_key or api_key_file: without keys there are no tenants"


class Adapters:
    """Decides which adapters each worker loads and frees; ``now`` is in monotonic seconds."""

    def __init__(self, cluster: Cluster) -> None:
        """Add the adapters of the configuration, in state LOADING."""
        self._cluster = cluster
        self._table = cluster.adapters
        self._number = 0
        self._answers: dict[str, int] = {}
        """Worker -> number of the newest command that it has carried out."""
        self._since: dict[str, float] = {}
        """Adapter key -> time at which its load began or requests last used it."""
        self._awaits_since: dict[str, float] = {}
        """Worker that waits only for its adapters -> time at which the wait began."""
        self._errors: dict[str, str] = {}
        """Adapter key -> error of its load, for the last ``_KEPT_ERRORS`` errors."""
        self.uses = AdapterUses()
        """Adapters used by requests at the gateways."""
        self._retry_at = 0.0
        for module in cluster.config.lora.adapters:
            self._add(module.name, module.path, module.tenants, cluster.began_at)

    # ---- queries --------------------------------------------------------------------------

    def is_settled(self, key: str) -> bool:
        """Whether the load of an adapter has succeeded or failed."""
        kept = self._table.by_key.get(key)
        return kept is None or kept.state is not AdapterState.LOADING

    def error(self, key: str) -> str:
        """Reason why an adapter could not be loaded; empty without an error."""
        return self._errors.get(key, "")

    def answer(self, key: str) -> dict[str, Any]:
        """Return the entry of a loaded adapter; empty if it has been unloaded since.

        Raises ``RequestError`` if it could not be loaded.
        """
        if error := self.error(key):
            raise RequestError(f"lora_path: {error}", "lora_path")
        return next((entry for entry in self._table.to_list() if entry["key"] == key), {})

    # ---- commands ---------------------------------------------------------------------------

    def load(self, command: AdapterLoadCommand, now: float) -> str:
        """Begin to load an adapter; return its key.

        Raises ``RequestError`` and ``ConflictError``.
        """
        cluster, name = self._cluster, command.name
        command.check(cluster.config)
        if self._table.named(name) is not None:
            raise RequestError(f"lora_name ({name}) is loaded already, or loading", "lora_name")
        limit, known = cluster.config.lora.max_loras, self._table.by_key.values()
        if len(known) >= limit:
            states = ", ".join(f"{k.adapter.name} {k.state.value}" for k in known)
            raise ConflictError(f"at most {limit} (max_loras) adapters may be loaded: {states}")
        if not cluster.can_accept_operations:
            raise ConflictError(f"the cluster is {cluster.state.value}")
        kept = self._add(name, command.path, command.tenants, now)
        cluster.send_snapshot()
        self._order_all()
        return kept.adapter.key

    def unload(self, name: str, now: float) -> str:
        """Refuse new requests for an adapter, and return its key.

        Raises ``ModelNotFoundError`` and ``ConflictError``.
        """
        kept = self._table.named(name)
        if kept is None:
            raise ModelNotFoundError(f"the adapter {name[:128]!r} does not exist", "lora_name")
        if kept.state is not AdapterState.READY:
            raise ConflictError(f"the adapter {name} is {kept.state.value}")
        self._retire(kept, now)
        return kept.adapter.key

    # ---- events ---------------------------------------------------------------------------

    def restore(self, now: float) -> None:
        """Send all adapters to the workers again: a new controller does not know what they got."""
        self._since = dict.fromkeys(self._table.by_key, now)
        for kept in self._table.in_state(AdapterState.UNLOADING):
            self.uses.retire(kept.adapter.key, self._cluster.version)
        if self._table.was_ordered:
            members = {m.name for m in self._cluster.round.members}
            for record in self._workers():
                record.awaits_adapters = record.name not in members
            self._order_all()

    def registered(self, record: WorkerRecord) -> None:
        """Send the adapters to a new worker, which loads them after its weights."""
        if record.member.runs_attention and self._table.by_key:
            record.awaits_adapters = True
            self._order(record)

    def answered(self, record: WorkerRecord, frame: AdaptersKept, now: float) -> str:
        """Record a worker's report of its adapters; return the reason if the start must fail."""
        name, errors = record.name, dict(frame.errors)
        if frame.number < self._number:
            return ""
        for key in self._table.compare_digests(frame.digests):
            errors[key] = "its files differ from those that other workers have read"
        self._answers[name] = frame.number
        is_new, record.awaits_adapters = record.awaits_adapters, False
        if is_new:
            self._cluster.touch()  # gateways may now send requests to the worker
        changed = self._table.note_lacking(name, errors)
        if changed:  # gateways send the worker no requests for these
            self._cluster.send_snapshot()
        words = [
            self._failed(name, key, error, now, is_new=is_new, is_news=key in changed)
            for key, error in errors.items()
        ]
        self._settle(now)
        return "; ".join(filter(None, words))

    def tick(self, now: float) -> dict[str, str]:
        """Check all time limits; return the workers that replied too late, with the reason."""
        self._settle(now)  # workers that did not answer may be lost
        for kept in self._table.in_state(AdapterState.LOADING):
            if not self._is_starting and now >= self._since[kept.adapter.key] + LOAD_LIMIT_S:
                asked = [r for r in self._workers() if self._answers.get(r.name, 0) < kept.number]
                names = ", ".join(r.name for r in asked) or "any worker"
                error = f"{kept.adapter.path}: no reply of {names} within {LOAD_LIMIT_S:g} s"
                self._drop(kept, error, now)
        self._retry(now)
        in_use = {key for record in self._workers() for key in record.adapters}
        for kept in self._table.in_state(AdapterState.UNLOADING):
            key = kept.adapter.key
            if key in in_use or self.uses.may_use(key) or not self._cluster.runs:
                self._since[key] = now
            elif now >= self._since[key] + UNUSED_S:
                self._drop(kept, "", now)
        waiting = [r.name for r in self._workers() if r.loads_adapters]
        self._awaits_since = {n: self._awaits_since.get(n, now) for n in waiting}
        late = [n for n, since in self._awaits_since.items() if now >= since + LOAD_LIMIT_S]
        return dict.fromkeys(late, f"it has not loaded its adapters within {LOAD_LIMIT_S:g} s")

    def problems(self) -> list[str]:
        """Messages for operators: workers that serve without an adapter."""
        alive = {record.name for record in self._workers()}
        return [
            f"{worker} serves without the adapter {kept.adapter.name}, which it could not load"
            for kept in self._table.in_state(AdapterState.READY)
            for worker in kept.lacking
            if worker in alive
        ]

    # ---- changes --------------------------------------------------------------------------

    def _retry(self, now: float) -> None:
        """Let workers that lack an adapter retry its load."""
        if not self.problems():
            self._retry_at = now + RETRY_S
        elif now >= self._retry_at:
            self._retry_at = now + RETRY_S
            self._order_all()

    @property
    def _is_starting(self) -> bool:
        return self._cluster.state is ClusterState.STARTING

    def _workers(self) -> list[WorkerRecord]:
        """Live workers that run attention."""
        return [r for r in self._cluster.workers.alive() if r.member.runs_attention]

    def _settle(self, now: float) -> None:
        """Make adapters that all workers have loaded ready for requests."""
        cluster = self._cluster
        asked = [r for r in self._workers() if r.may_join or self._is_starting]
        for kept in self._table.in_state(AdapterState.LOADING):
            answers = [self._answers.get(r.name, 0) >= kept.number for r in asked]
            if asked and all(answers):
                self._table.enter(kept, AdapterState.READY)
                cluster.note(f"adapter {kept.adapter.name} is loaded", "requests may name it", now)
                cluster.send_snapshot()

    def _add(self, name: str, path: str, tenants: tuple[str, ...], now: float) -> KeptAdapter:
        self._number = next(self._cluster.order_numbers)
        kept = self._table.add(name, path, tenants, self._number)
        self._since[kept.adapter.key] = now
        return kept

    def _retire(self, kept: KeptAdapter, now: float) -> None:
        self._table.enter(kept, AdapterState.UNLOADING)
        self._since[kept.adapter.key] = now
        self._cluster.note(
            f"adapter {kept.adapter.name} is unloaded", "no request may name it", now
        )
        self._cluster.send_snapshot()
        self.uses.retire(kept.adapter.key, self._cluster.version)

    def _failed(
        self, worker: str, key: str, error: str, now: float, *, is_new: bool, is_news: bool
    ) -> str:
        """Handle an adapter that a worker cannot load; return the reason if the start must fail.

        The error ends the start, or the load that a client requested. An adapter that is loaded
        stays in use on the other workers. ``is_new``: the worker has not joined. ``is_news``: the
        error is new.
        """
        kept = self._table.by_key.get(key)
        if kept is None:
            return ""
        if self._is_starting:
            return f"the adapter {kept.adapter.name} cannot be loaded: {error}"
        words = f"{worker} cannot load the adapter {kept.adapter.name}: {error}"
        if kept.state is AdapterState.LOADING and not is_new:
            self._drop(kept, words, now)
        elif is_news:
            self._cluster.note(words, "other workers run its requests", now)
        return ""

    def _drop(self, kept: KeptAdapter, error: str, now: float) -> None:
        """Remove an adapter and let the workers free it."""
        key = kept.adapter.key
        del self._since[key]
        self._table.remove(key)
        self.uses.forget(key)
        if error:
            self._errors = dict([*self._errors.items(), (key, error)][-_KEPT_ERRORS:])
            self._cluster.note(error, f"adapter {kept.adapter.name} is not loaded", now)
        self._cluster.send_snapshot()
        self._order_all()

    def _order_all(self) -> None:
        self._number = next(self._cluster.order_numbers)
        for record in self._workers():
            if record.state is not WorkerState.STARTING:  # a starting worker has not connected yet
                record.awaits_adapters = record.awaits_adapters or record.is_pending
                self._order(record)

    def _order(self, record: WorkerRecord) -> None:
        adapters = tuple(kept.adapter for kept in self._table.by_key.values())
        self._cluster.send(KeepAdapters(number=self._number, adapters=adapters), record.name)
