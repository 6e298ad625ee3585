"""Whether the cluster can serve requests, by the controller's snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.core.errors import NotReadyError
from gateway.cluster.view import Snapshot

_SERVING = ("SERVING", "DEGRADED")


def unready_reasons(
    snapshot: Snapshot | None, refusal: str = "", is_whole: bool = True
) -> list[str]:
    """Why the cluster cannot serve new requests now; empty when it can.

    Without ``is_whole`` the cluster's error, which names hosts and paths, is left out.

    ``refusal`` is why the controller's snapshots are refused. It is no reason for a gateway that
    has an earlier one: as without a controller, it serves with the workers that it knows.
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
    """Whether requests can be handed over now; False while they should wait.

    Arguments as for ``unready_reasons``.

    Raises:
        NotReadyError: waiting would not help.
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


def server_ends() -> NotReadyError:
    """The refusal of a server that is about to stop."""
    return NotReadyError("the server is about to stop", "draining", 10.0)


def _ranks(snapshot: Snapshot, names: Iterable[str]) -> Iterator[str]:
    """``expert rank 1 (expert-1.2)`` of each worker."""
    known = {worker["name"]: worker for worker in snapshot.get("workers", ())}
    for name in names:
        worker = known.get(name)
        yield name if worker is None else f"{worker['role']} rank {worker['rank']} ({name})"


def _state_of(snapshot: Snapshot, is_whole: bool) -> str:
    reason = snapshot.get("error") if is_whole else None
    return f"the cluster is {snapshot['state']}" + (f": {reason}" if reason else "")
