"""Readiness of a gateway replica: from the controller's snapshot and the state of the replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.core.errors import NotReadyError
from gateway.auth.auth import KeyRing, is_operator
from gateway.cluster.view import Snapshot, SnapshotFollower
from gateway.engines.engine_pool import EnginePool

_SERVING = ("SERVING", "DEGRADED")


class Readiness:
    """Decides whether a gateway replica accepts requests, and whether it reports that it is ready.

    Args:
        cluster: follows the controller.
        engines: streams to the attention workers.
        keys: distinguishes operators from clients, whose error texts have fewer details.
        leaving_lead_s: seconds that load balancers get to notice that the replica is not ready.
    """

    def __init__(
        self, cluster: SnapshotFollower, engines: EnginePool, keys: KeyRing, leaving_lead_s: float
    ) -> None:
        self._cluster = cluster
        self._engines = engines
        self._keys = keys
        self._leaving_lead_s = leaving_lead_s
        self._leaves_since_s: float | None = None
        self.accepts_calls = True
        """Whether the replica accepts new calls; False after the first stage of its shutdown."""

    @property
    def is_leaving(self) -> bool:
        """Whether the gateway is about to stop; it still serves new requests."""
        return self._leaves_since_s is not None

    def leave(self, now_s: float) -> None:
        """Become permanently not ready from ``now_s`` (monotonic) on; requests are still served."""
        if self._leaves_since_s is None:
            self._leaves_since_s = now_s

    def has_left(self, now_s: float) -> bool:
        """Return whether ``leave`` was called at least ``leaving_lead_s`` seconds before ``now_s``.

        Load balancers then had time to notice that this gateway is not ready.
        """
        since_s = self._leaves_since_s
        return since_s is not None and now_s >= since_s + self._leaving_lead_s

    def not_ready_reasons(self, is_whole: bool = True) -> list[str]:
        """Return reasons why new requests cannot be served now; empty if they can be served.

        Unless ``is_whole``, the reasons contain only details that clients may see.
        """
        if self.is_leaving:
            return ["this gateway is about to stop"]
        snapshot = self._cluster.snapshot
        reasons = unready_reasons(snapshot, self._cluster.refusal, is_whole)
        if snapshot is not None and not self._engines.clients:
            reasons.append("no attention worker has an open stream")
        return reasons

    def require_serving(self) -> None:
        """Raise ``NotReadyError`` unless a new call can be served now, or after a short wait."""
        if not self.accepts_calls:
            raise shutdown_error()
        self.check_serving()

    def check_serving(self) -> bool:
        """Return whether requests can be sent to the engines now; False while they should wait.

        Raises ``NotReadyError``, with details that the caller may see, if they should be refused.
        """
        is_whole = is_operator(self._keys)
        return check_serving(self._cluster.snapshot, self._cluster.refusal, is_whole)


def unready_reasons(
    snapshot: Snapshot | None, refusal: str = "", is_whole: bool = True
) -> list[str]:
    """Return reasons why the cluster cannot serve new requests now; empty if it can.

    Unless ``is_whole``, the cluster's error is omitted, since it names hosts and paths. ``refusal``
    is the reason why this gateway rejects the controller's snapshots. It is ignored if there is an
    earlier ``snapshot``: the gateway then serves with the workers in this snapshot.
    """
    if snapshot is None:
        return [refusal or "the controller has not answered yet"]
    reasons = [] if snapshot["state"] in _SERVING else [_state_of(snapshot, is_whole)]
    if late := snapshot.get("late_workers"):
        reasons.append(f"steps wait for {', '.join(_ranks(snapshot, late))}")
    if not snapshot.get("experts_complete", True):
        reasons.append("some experts are on no worker")
    return reasons


def check_serving(snapshot: Snapshot | None, refusal: str = "", is_whole: bool = True) -> bool:
    """Return whether requests can be sent to the engines now; False while they should wait.

    The arguments are described in ``unready_reasons``.

    Raises:
        NotReadyError: the requests should be refused instead of waiting.
    """
    if snapshot is None:
        raise NotReadyError(refusal or "the cluster is starting", "not_ready", 2.0)
    state = snapshot["state"]
    if state == "RECOVERING":
        return False
    if state == "DRAINING":
        raise NotReadyError("the cluster is draining", "draining", 10.0)
    if state not in _SERVING:
        raise NotReadyError(_state_of(snapshot, is_whole), "not_ready", 2.0)
    if not snapshot.get("experts_complete", True):
        raise NotReadyError("some experts are on no worker", "experts_unavailable", 5.0)
    return True


def shutdown_error() -> NotReadyError:
    """Return the error with which a server that is about to stop refuses and ends requests."""
    return NotReadyError("the server is about to stop", "draining", 10.0)


def _ranks(snapshot: Snapshot, names: Iterable[str]) -> Iterator[str]:
    """Yield a description of each worker, such as ``expert rank 1 (expert-1.2)``."""
    known = {worker["name"]: worker for worker in snapshot.get("workers", ())}
    for name in names:
        worker = known.get(name)
        yield name if worker is None else f"{worker['role']} rank {worker['rank']} ({name})"


def _state_of(snapshot: Snapshot, is_whole: bool) -> str:
    reason = snapshot.get("error") if is_whole else None
    return f"the cluster is {snapshot['state']}" + (f": {reason}" if reason else "")
