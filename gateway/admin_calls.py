"""The procedures of ``expertmesh.v1.Admin``, for both codecs: a message in, a message out.

``grpc_admin`` and ``http_admin`` find a procedure by its name in the service's description. One
that is described and has no method here answers that it is not built yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from cluster.errors import ExpertMeshError, NotBuiltError, NotReadyError, RequestError
from gateway.cluster_view import Controller
from gateway.core import Gateway
from protos import admin_pb2 as pb

SERVICE: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["Admin"]
"""Description of the service."""
DEFAULT_DRAIN_LIMIT_S = 120.0
"""Limit of a drain for which no other is given."""
CALL_LIMIT_S = 5.0
"""Time that the controller has to answer."""
MAX_ABORTED = 1024
"""Requests that one call may end."""
_WATCH_S = 10.0
_RETRY_S = 0.2

Answer = TypeVar("Answer")
Unary = Callable[[Message], Awaitable[Message]]
Streaming = Callable[[Message], AsyncIterator[Message]]


class AdminCalls:
    """What the service does. The controller does nearly all the work; any replica can ask it to."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._cluster = gateway.cluster

    def unary(self, name: str) -> Unary:
        """The procedure of that name. Calling it raises ``NotBuiltError`` if there is none yet."""
        return cast(Unary, getattr(self, name, None) or _not_built(name))

    def streaming(self, name: str) -> Streaming:
        """The same for procedures that answer with a stream."""
        return cast(Streaming, getattr(self, name, None) or _not_built(name))

    # ---- reading --------------------------------------------------------------------------

    async def GetPlacement(self, request: pb.GetPlacementRequest) -> pb.Placement:
        """Which device holds which copy of which expert."""
        found = await _answer(self._controller().placement())
        banks = [
            b
            for b in found["banks"]
            if not request.HasField("layer") or b["layer"] == request.layer
        ]
        if request.HasField("layer") and not banks:
            raise RequestError(f"layer {request.layer} has no expert bank", "layer")
        return pb.Placement(epoch=found["epoch"], banks=map(_bank_maps, banks))

    async def GetExpertLoad(self, request: pb.GetExpertLoadRequest) -> pb.ExpertLoad:
        """Tokens by layer, expert and worker, as far as the controller knows."""
        found = await _answer(self._controller().load())
        return pb.ExpertLoad(
            epoch=found["epoch"],
            banks=map(_bank_load, found["banks"]),
            model=found["model"] or "",
            top_k=found["top_k"],
            tokens=found["tokens"],
            window_tokens=found.get("window_tokens", 0),
            average_tokens=found.get("average_tokens", 0),
            balancedness=pb.Balancedness(**found.get("balancedness", {})),
            workers=[name or "" for name in found.get("workers", ())],
        )

    async def ListWorkers(self, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
        """Every worker, lost ones included."""
        snapshot = await _answer(self._controller().snapshot())
        return pb.ListWorkersResponse(workers=map(_worker_info, snapshot["workers"]))

    async def WatchCluster(self, request: pb.WatchClusterRequest) -> AsyncIterator[pb.ClusterEvent]:
        """What happened, then what happens. An entry that was added to comes again, whole."""
        snapshot = await _answer(self._controller().snapshot())
        seen = snapshot["history"] if request.only_new else []
        while True:
            for entry in (e for e in snapshot["history"] if e not in seen):
                yield _event(entry)
            seen = snapshot["history"]
            snapshot = await self._next(int(snapshot["version"]))

    async def _next(self, version: int) -> dict[str, Any]:
        """The next snapshot, also of a controller that is restarted meanwhile."""
        while True:
            try:
                call = self._controller().wait_snapshot(version, _WATCH_S)
                snapshot = await _answer(call, _WATCH_S + CALL_LIMIT_S)
            except NotReadyError:
                await asyncio.sleep(_RETRY_S)
                continue
            if int(snapshot["version"]) != version:
                return snapshot

    # ---- operations -----------------------------------------------------------------------

    async def DrainWorker(self, request: pb.DrainWorkerRequest) -> pb.Operation:
        """Empty a worker, or all of a node, and end it."""
        if bool(request.worker) == bool(request.node):
            raise RequestError("one of worker and node is required", "worker")
        limit_s = request.deadline_s or DEFAULT_DRAIN_LIMIT_S
        if not 0 < limit_s < float("inf"):
            raise RequestError(f"deadline_s ({limit_s}) must be above 0", "deadline_s")
        order = {
            "worker": request.worker,
            "node": request.node,
            "limit_s": limit_s,
            "force": request.force,
            "request_id": request.request_id,
            "expected_epoch": _epoch(request),
        }
        return _operation(await _answer(self._controller().drain(order)))

    async def DrainGateway(self, request: pb.DrainGatewayRequest) -> pb.DrainGatewayResponse:
        """This replica leaves; the controller has no part in it."""
        left = self._gateway.leave(time.monotonic())
        return pb.DrainGatewayResponse(gateway=self._gateway.name, requests=left)

    async def Rebalance(self, request: pb.RebalanceRequest) -> pb.Operation:
        """Move experts to where the load is, or with ``dry_run`` say what would be done."""
        order = {
            "dry_run": request.dry_run,
            "request_id": request.request_id,
            "expected_epoch": _epoch(request),
        }
        return _operation(await _answer(self._controller().rebalance(order)))

    async def GetOperation(self, request: pb.GetOperationRequest) -> pb.Operation:
        """One operation."""
        return _operation(await _answer(self._controller().operation(request.id)))

    async def ListOperations(self, request: pb.ListOperationsRequest) -> pb.ListOperationsResponse:
        """The operations that are remembered, newest last."""
        found = await _answer(self._controller().operations())
        return pb.ListOperationsResponse(operations=map(_operation, found))

    async def CancelOperation(self, request: pb.CancelOperationRequest) -> pb.Operation:
        """Give an operation up, where it can still be undone."""
        return _operation(await _answer(self._controller().cancel_operation(request.id)))

    async def AbortRequests(self, request: pb.AbortRequestsRequest) -> pb.AbortRequestsResponse:
        """End requests of clients by id, whichever replica has them."""
        names = list(request.request_ids)
        if not 0 < len(names) <= MAX_ABORTED:
            told = f"request_ids ({len(names)} of them) must be 1 to {MAX_ABORTED}"
            raise RequestError(told, "request_ids")
        return pb.AbortRequestsResponse(aborted=await self._gateway.abort_calls(names))

    def _controller(self) -> Controller:
        return self._cluster.require_controller()


def full_name(method: MethodDescriptor) -> str:
    """``/expertmesh.v1.Admin/DrainWorker``."""
    return f"/{SERVICE.full_name}/{method.name}"


def _not_built(name: str) -> Callable[[Message], Any]:
    def refuse(request: Message) -> Any:
        raise NotBuiltError(f"{name} is not built yet")

    return refuse


def _epoch(request: pb.DrainWorkerRequest | pb.RebalanceRequest | pb.ScaleRequest) -> int | None:
    return request.expected_epoch if request.HasField("expected_epoch") else None


def _operation(found: Mapping[str, Any]) -> pb.Operation:
    """From the controller's plain data; its ``result`` is that of the kind's field."""
    values = {k: v for k, v in found.items() if k not in ("state", "result")}
    message = pb.Operation(state=pb.Operation.State.Value(found["state"]), **values)
    if found["result"]:
        result = getattr(message, found["kind"])
        result.CopyFrom(type(result)(**found["result"]))
    return message


async def _answer(call: Awaitable[Answer], limit_s: float = CALL_LIMIT_S) -> Answer:
    """The controller's answer. Raises ``NotReadyError`` when there is none, and its own errors."""
    try:
        return await asyncio.wait_for(call, limit_s)
    except ExpertMeshError:
        raise
    except Exception as err:  # any failure of the actor or of Ray
        raise NotReadyError("the controller does not answer", "not_ready", 2.0) from err


def _event(entry: Mapping[str, Any]) -> pb.ClusterEvent:
    known = pb.ClusterEvent.DESCRIPTOR.fields_by_name
    return pb.ClusterEvent(**{k: v for k, v in entry.items() if k in known and v is not None})


def _bank_maps(bank: Mapping[str, Any]) -> pb.BankMaps:
    return pb.BankMaps(
        bank=bank["bank"],
        layer=bank["layer"],
        physical_to_logical=(pb.ExpertSlots(experts=s) for s in bank["physical_to_logical"]),
        load=bank["load"],
        balancedness=pb.Balancedness(**bank["balancedness"]),
    )


def _bank_load(bank: Mapping[str, Any]) -> pb.BankLoad:
    return pb.BankLoad(
        bank=bank["bank"],
        layer=bank["layer"],
        load=bank["counts"],
        balancedness=pb.Balancedness(**bank["balancedness"]),
        prefill=bank["prefill"] or (),
        decode=bank["decode"] or (),
        window=bank["window"] or (),
        average=bank["average"] or (),
        slots=(pb.SlotTokens(tokens=tokens) for tokens in bank["slots"] or ()),
        prefill_balancedness=pb.Balancedness(**bank["phases"]["prefill"]),
        decode_balancedness=pb.Balancedness(**bank["phases"]["decode"]),
    )


def _worker_info(worker: Mapping[str, Any]) -> pb.WorkerInfo:
    names = ("name", "role", "rank", "node", "pid", "state", "reason", "slots", "kv_usage")
    return pb.WorkerInfo(**{n: worker[n] for n in names if worker.get(n) is not None})
