"""LoRA adapters: makes all attention workers load the same adapters, for requests that name them.

    load ─▶ LOADING ─▶ all workers have it ─▶ READY ─▶ unload ─▶ UNLOADING
        ─▶ no request has used it for a while ─▶ workers free it

A new worker joins once it has all adapters that it can load. Requests for an adapter that a worker
cannot load go to other workers, and the worker retries every ``RETRY_S``. A command lists all
adapters that a worker must have, so any controller, also a restarted one, can send it at any time.
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
"""Time limit, in seconds, for all workers to load an adapter, or a new worker all adapters."""
_KEPT_ERRORS = 64
UNUSED_S = 5.0
"""Seconds without requests after which workers free an unloaded adapter. The delay is for requests
that are moving from a lost worker to another one."""


RETRY_S = 30.0
"""Seconds between two attempts of a worker to load an adapter that it could not load."""


class AdapterUnloadCommand(Message, frozen=True, kw_only=True):
    """A client's command to unload an adapter."""

    name: str


class AdapterLoadCommand(Message, frozen=True, kw_only=True):
    """A client's command to load an adapter."""

    name: str
    path: str
    tenants: tuple[str, ...] = ()
    """Names of the API keys that may use the adapter; if empty, every caller may use it."""

    def check(self, config: ClusterConfig) -> None:
        """Raise ``RequestError`` if the configuration does not allow this adapter."""
        if not is_valid_name(self.name):
            raise RequestError(f"lora_name ({self.name[:128]!r}) {NAME_RULE}", "lora_name")
        if why := self._path_error(config.lora):
            raise RequestError(f"lora_path ({self.path[:128]!r}) {why}", "lora_path")
        if why := self._tenants_error(config.gateway.requires_keys):
            raise RequestError(f"tenants ({len(self.tenants)} of them) {why}", "tenants")
        if self.name == config.model.served_model_name:
            raise RequestError(f"lora_name ({self.name}) is the name of the model", "lora_name")

    def _path_error(self, lora: LoraSection) -> str:
        """Reason why the path of the adapter is not allowed; empty if it is allowed."""
        if not is_folder_path(self.path):
            return f"must be an absolute path of at most {MAX_PATH} characters"
        if lora.allows_path(self.path):
            return ""
        roots = ", ".join(lora.roots) or "none is named"
        return f"must be in a folder of --lora-roots, without '..' ({roots})"

    def _tenants_error(self, has_keys: bool) -> str:
        """Reason why the tenants of the adapter are not allowed; empty if they are allowed."""
        if not are_valid_tenants(self.tenants):
            return f"must be at most {MAX_TENANTS} names of at most {MAX_TENANT} characters"
        if not self.tenants or has_keys:
            return ""
        return "need api_key or api_key_file: without keys there are no tenants"


class Adapters:
    """Decides which LoRA adapters the attention workers load and free.

    ``now`` is in monotonic seconds.
    """

    def __init__(self, cluster: Cluster) -> None:
        """Add the adapters of the configuration, in state LOADING."""
        self._cluster = cluster
        self._table = cluster.adapters
        self._number = 0
        self._answers: dict[str, int] = {}
        """Worker -> number of the newest command about adapters that the worker has answered."""
        self._since: dict[str, float] = {}
        """Adapter key -> time at which the adapter's load began or, once unloaded, its last use."""
        self._awaits_since: dict[str, float] = {}
        """Worker that only lacks adapters to join a generation -> time at which the wait began."""
        self._errors: dict[str, str] = {}
        """Adapter key -> error of the adapter's load, for the last ``_KEPT_ERRORS`` errors."""
        self.uses = AdapterUses()
        """Adapters that requests at the gateways use, as the gateways report them."""
        self._retry_at = 0.0
        for module in cluster.config.lora.adapters:
            self._add(module.name, module.path, module.tenants, cluster.began_at)

    # ---- queries --------------------------------------------------------------------------

    def is_settled(self, key: str) -> bool:
        """Return whether the load of the adapter with this key has succeeded or failed."""
        kept = self._table.by_key.get(key)
        return kept is None or kept.state is not AdapterState.LOADING

    def error(self, key: str) -> str:
        """Return why the adapter with this key could not be loaded; empty without an error."""
        return self._errors.get(key, "")

    def answer(self, key: str) -> dict[str, Any]:
        """Return the status of a loaded adapter; empty if the adapter has been unloaded since.

        Raises ``RequestError`` if the adapter could not be loaded.
        """
        if error := self.error(key):
            raise RequestError(f"lora_path: {error}", "lora_path")
        return next((entry for entry in self._table.to_list() if entry["key"] == key), {})

    # ---- commands ---------------------------------------------------------------------------

    def load(self, command: AdapterLoadCommand, now: float) -> str:
        """Make the workers load an adapter; return the key of the adapter.

        Raises ``RequestError`` if the command is invalid or the name in use, and ``ConflictError``
        if there are too many adapters or the cluster is starting or ending.
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
        """Refuse new requests for an adapter, which is freed later; return the adapter's key.

        Raises ``ModelNotFoundError`` for an unknown name, and ``ConflictError`` if the adapter is
        not ready.
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
        """Send all adapters to the workers again, after a restart of the controller.

        The restarted controller does not know which commands the workers have received.
        """
        self._since = dict.fromkeys(self._table.by_key, now)
        for kept in self._table.in_state(AdapterState.UNLOADING):
            self.uses.retire(kept.adapter.key, self._cluster.version)
        if self._table.was_ordered:
            members = {m.name for m in self._cluster.round.members}
            for record in self._workers():
                record.awaits_adapters = record.name not in members
            self._order_all()

    def registered(self, record: WorkerRecord) -> None:
        """Send the adapters to a new worker, which loads them after the model's weights."""
        if record.member.runs_attention and self._table.by_key:
            record.awaits_adapters = True
            self._order(record)

    def answered(self, record: WorkerRecord, frame: AdaptersKept, now: float) -> str:
        """Record a worker's report of its adapters.

        Returns the reason why the cluster's start must fail; empty if it need not fail.
        """
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
        """Check all time limits; return workers (name -> reason) that still lack adapters."""
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
        """Return messages for operators about workers that serve without an adapter."""
        alive = {record.name for record in self._workers()}
        return [
            f"{worker} serves without the adapter {kept.adapter.name}, which it could not load"
            for kept in self._table.in_state(AdapterState.READY)
            for worker in kept.lacking
            if worker in alive
        ]

    # ---- changes --------------------------------------------------------------------------

    def _retry(self, now: float) -> None:
        """Let workers that lack an adapter retry its load, every ``RETRY_S``."""
        if not self.problems():
            self._retry_at = now + RETRY_S
        elif now >= self._retry_at:
            self._retry_at = now + RETRY_S
            self._order_all()

    @property
    def _is_starting(self) -> bool:
        return self._cluster.state is ClusterState.STARTING

    def _workers(self) -> list[WorkerRecord]:
        """Return the live workers that run attention and therefore load adapters."""
        return [r for r in self._cluster.workers.alive() if r.member.runs_attention]

    def _settle(self, now: float) -> None:
        """Make adapters ready for requests once all workers have answered their load command."""
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

        The error ends the cluster's start, or the load that a client requested. An adapter that is
        ready stays in use on the other workers. ``is_new``: whether the worker has yet to join a
        generation. ``is_news``: whether the worker has not reported the error before.
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
        """Remove an adapter and make workers free it; ``error``: why its load failed, or empty."""
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
