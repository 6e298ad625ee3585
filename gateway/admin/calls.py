"""The methods of ``expertmesh.v1.Admin``, independent of the protocol.

A method takes the request message and returns or yields responses. ``gateway.admin.grpc`` and
``gateway.admin.http`` look up methods by their names in the service's descriptor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from cluster.core.errors import (
    ConflictError,
    ModelNotFoundError,
    NotReadyError,
    RequestError,
)
from gateway.auth.auth import EVENTS, LOGS, NUMBERS_BY_EXPERT, check_operator, is_operator
from gateway.calls.gateway import Gateway
from gateway.cluster.client_view import client_workers
from gateway.cluster.shared_result import SharedResult
from protos import admin_pb2 as pb

SERVICE: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["Admin"]
DEFAULT_DRAIN_LIMIT_S = 120.0
DEFAULT_SCALE_LIMIT_S = 300.0
CALL_LIMIT_S = 5.0
"""Time limit in seconds for a reply of the controller."""
MAX_ABORTED = 1024
"""Maximum number of requests that one call may abort."""
LORA_LIMIT_S = 140.0
"""Time limit in seconds for all workers to load an adapter."""
_MAX_LOOKS = 40
_LOOK_S = 0.05
_WATCH_S = 10.0
_RETRY_S = 0.2

AnyMessage = TypeVar("AnyMessage", bound=Message)


class AdminCalls:
    """The admin methods. Most of them call the controller, so that any replica can serve them."""

    def __init__(self, gateway: Gateway) -> None:
        """``gateway``: the gateway of the model that the methods concern."""
        self._gateway = gateway
        self._call = partial(gateway.cluster.call, limit_s=CALL_LIMIT_S)
        self._snapshot = SharedResult(lambda: self._call("snapshot", True), gateway.numbers.age_s)

    # ---- queries --------------------------------------------------------------------------

    async def GetPlacement(self, request: pb.GetPlacementRequest) -> pb.Placement:
        """Return the placement, which maps expert copies to workers."""
        self._check_operator(NUMBERS_BY_EXPERT)
        found = await self._gateway.numbers.placement()
        banks = found["banks"]
        if request.HasField("layer"):
            banks = [bank for bank in banks if bank["layer"] == request.layer]
            if not banks:
                raise RequestError(f"layer {request.layer} has no expert bank", "layer")
        return pb.Placement(epoch=found["epoch"], banks=map(_bank_maps, banks))

    async def GetExpertLoad(self, request: pb.GetExpertLoadRequest) -> pb.ExpertLoad:
        """Return the number of tokens by layer, expert and worker."""
        self._check_operator(NUMBERS_BY_EXPERT)
        found = await self._gateway.numbers.load()
        workers = [name or "" for name in found.get("workers", ())]
        banks = [_bank_load(bank) for bank in found["banks"]]
        return _message(pb.ExpertLoad, {**found, "banks": banks, "workers": workers})

    async def ListWorkers(self, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
        """Return all workers, including lost ones."""
        snapshot = await self._snapshot.get()
        found = snapshot["workers"]
        if not is_operator(self._gateway.admin_keys):
            found = client_workers(snapshot)
        return pb.ListWorkersResponse(workers=(_message(pb.WorkerInfo, one) for one in found))

    async def WatchCluster(
        self, request: pb.WatchClusterRequest
    ) -> AsyncGenerator[pb.ClusterEvent]:
        """Yield the event history, then new events. An event that changes is yielded again."""
        self._check_operator(EVENTS)
        snapshot = await self._snapshot.get()
        seen = snapshot["history"] if request.only_new else []
        while True:
            for entry in (e for e in snapshot["history"] if e not in seen):
                yield _message(pb.ClusterEvent, entry)
            seen = snapshot["history"]
            snapshot = await self._next(int(snapshot["version"]))

    def _check_operator(self, what: str) -> None:
        check_operator(self._gateway.admin_keys, what)

    async def _next(self, version: int) -> dict[str, Any]:
        """Wait for a snapshot whose version is not ``version``; retry while no controller runs."""
        while True:
            try:
                snapshot: dict[str, Any] = await self._call(
                    "wait_snapshot", version, _WATCH_S, limit_s=_WATCH_S + CALL_LIMIT_S
                )
            except NotReadyError:
                await asyncio.sleep(_RETRY_S)
                continue
            if int(snapshot["version"]) != version:
                return snapshot

    # ---- operations -----------------------------------------------------------------------

    async def DrainWorker(self, request: pb.DrainWorkerRequest) -> pb.Operation:
        """Start an operation that drains a worker, or all workers of a node."""
        if bool(request.worker) == bool(request.node):
            raise RequestError("one of worker and node is required", "worker")
        order = {
            "worker": request.worker,
            "node": request.node,
            "limit_s": _limit_s(request, DEFAULT_DRAIN_LIMIT_S),
            "force": request.force,
            "request_id": request.request_id,
            "expected_epoch": _epoch(request),
        }
        return _operation(await self._call("begin", "drain", order))

    async def DrainGateway(self, request: pb.DrainGatewayRequest) -> pb.DrainGatewayResponse:
        """Drain this replica, without the controller; return its number of running requests."""
        left = self._gateway.leave(time.monotonic())
        return pb.DrainGatewayResponse(gateway=self._gateway.name, requests=left)

    async def Scale(self, request: pb.ScaleRequest) -> pb.Operation:
        """Start an operation that changes the number of workers."""
        order = {
            "attention": request.attention if request.HasField("attention") else None,
            "expert": request.expert if request.HasField("expert") else None,
            "prefill": request.prefill if request.HasField("prefill") else None,
            "decode": request.decode if request.HasField("decode") else None,
            "limit_s": _limit_s(request, DEFAULT_SCALE_LIMIT_S),
            "request_id": request.request_id,
            "expected_epoch": _epoch(request),
        }
        return _operation(await self._call("begin", "scale", order))

    async def Rebalance(self, request: pb.RebalanceRequest) -> pb.Operation:
        """Start to rebalance the experts; with ``dry_run``, only predict the changes."""
        order = {
            "dry_run": request.dry_run,
            "request_id": request.request_id,
            "expected_epoch": _epoch(request),
        }
        return self._shown_operation(await self._call("begin", "rebalance", order))

    async def GetOperation(self, request: pb.GetOperationRequest) -> pb.Operation:
        return self._shown_operation(await self._call("operation", request.id))

    async def ListOperations(self, request: pb.ListOperationsRequest) -> pb.ListOperationsResponse:
        found = await self._call("operations")
        return pb.ListOperationsResponse(operations=map(self._shown_operation, found))

    async def CancelOperation(self, request: pb.CancelOperationRequest) -> pb.Operation:
        """Cancel an operation that can still be rolled back."""
        return self._shown_operation(await self._call("cancel_operation", request.id))

    def _shown_operation(self, found: Mapping[str, Any]) -> pb.Operation:
        """Convert an operation. Callers who are not operators get no result of a rebalance."""
        if found["kind"] == "rebalance" and not is_operator(self._gateway.admin_keys):
            found = {**found, "message": "", "result": None}
        return _operation(found)

    async def GetLog(self, request: pb.GetLogRequest) -> pb.GetLogResponse:
        """Return log lines of a worker or of the controller."""
        self._check_operator(LOGS)
        found = await self._call("log", request.process, request.after)
        return pb.GetLogResponse(number=found["number"], lines=found["lines"])

    async def AbortRequests(self, request: pb.AbortRequestsRequest) -> pb.AbortRequestsResponse:
        """Abort requests of clients by id, on every replica."""
        names = list(request.request_ids)
        if not 0 < len(names) <= MAX_ABORTED:
            rule = f"request_ids ({len(names)} ids) must have 1 to {MAX_ABORTED} ids"
            raise RequestError(rule, "request_ids")
        return pb.AbortRequestsResponse(aborted=await self._gateway.status.abort_calls(names))

    # ---- adapters -------------------------------------------------------------------------

    async def LoadLoraAdapter(self, request: pb.LoadLoraAdapterRequest) -> pb.LoraAdapter:
        """Load an adapter, and wait until every replica accepts requests that name it."""
        for other in self._gateway.shared.models:
            name = other.model.name
            if name != self._gateway.model.name and other.model.knows(request.lora_name):
                rule = f"lora_name ({request.lora_name[:128]}) is in use by the model {name}"
                raise RequestError(rule, "lora_name")
        tenants = list(request.tenants)
        order = {"name": request.lora_name, "path": request.lora_path, "tenants": tenants}
        found = await self._call("begin", "load_adapter", order, limit_s=LORA_LIMIT_S)
        if not found:
            raise ConflictError(f"the adapter {request.lora_name} was unloaded during the load")
        await self._wait_replicas(lambda keys: found["key"] in keys)
        return _adapter(found)

    async def UnloadLoraAdapter(
        self, request: pb.UnloadLoraAdapterRequest
    ) -> pb.UnloadLoraAdapterResponse:
        """Unload an adapter, and wait until no replica accepts requests that name it."""
        if not self._gateway.model.adapters.may_unload(request.lora_name):
            raise ModelNotFoundError(
                f"the adapter {request.lora_name[:128]!r} does not exist", "lora_name"
            )
        found = await self._call("begin", "unload_adapter", {"name": request.lora_name})
        await self._wait_replicas(lambda keys: found["key"] not in keys)
        return pb.UnloadLoraAdapterResponse()

    async def ListLoraAdapters(
        self, request: pb.ListLoraAdaptersRequest
    ) -> pb.ListLoraAdaptersResponse:
        """Return the adapters that the caller may use, in any state; paths only for operators."""
        snapshot = self._gateway.model.adapters.without_others(await self._call("snapshot"))
        found = snapshot.get("adapters", ())
        if not is_operator(self._gateway.admin_keys):
            found = [{**adapter, "path": ""} for adapter in found]
        return pb.ListLoraAdaptersResponse(adapters=map(_adapter, found))

    async def _wait_replicas(self, knows: Callable[[list[str]], bool]) -> None:
        """Wait up to 2 s until ``knows(adapter_keys)`` is true for each replica that responds."""
        for _ in range(_MAX_LOOKS):
            answers = (await self._gateway.status.replicas.call("adapters")).values()
            if all(map(knows, answers)):
                return
            await asyncio.sleep(_LOOK_S)


def _adapter(found: Mapping[str, Any]) -> pb.LoraAdapter:
    return pb.LoraAdapter(
        lora_name=found["name"],
        lora_path=found["path"],
        state=found["state"],
        key=found["key"],
        tenants=found.get("tenants", ()),
    )


def _epoch(request: pb.DrainWorkerRequest | pb.ScaleRequest | pb.RebalanceRequest) -> int | None:
    return request.expected_epoch if request.HasField("expected_epoch") else None


def _limit_s(request: pb.DrainWorkerRequest | pb.ScaleRequest, default_s: float) -> float:
    limit_s = request.deadline_s or default_s
    if not 0 < limit_s < float("inf"):
        raise RequestError(f"deadline_s ({limit_s}) must be above 0", "deadline_s")
    return limit_s


def _operation(found: Mapping[str, Any]) -> pb.Operation:
    """Convert the controller's operation; ``result`` becomes the field with its kind's name."""
    values = {k: v for k, v in found.items() if k not in ("state", "result")}
    message = pb.Operation(state=pb.Operation.State.Value(found["state"]), **values)
    if found["result"]:
        result = getattr(message, found["kind"])
        result.CopyFrom(type(result)(**found["result"]))
    return message


def _message(kind: type[AnyMessage], values: Mapping[str, Any]) -> AnyMessage:
    """Make a message from ``values``, ignoring names that are not fields."""
    names = kind.DESCRIPTOR.fields_by_name
    return kind(**{k: v for k, v in values.items() if k in names and v is not None})


def _bank_maps(bank: Mapping[str, Any]) -> pb.BankMaps:
    slots = [pb.ExpertSlots(experts=experts) for experts in bank["physical_to_logical"]]
    return _message(pb.BankMaps, {**bank, "physical_to_logical": slots})


def _bank_load(bank: Mapping[str, Any]) -> pb.BankLoad:
    values = {
        **bank,
        "load": bank["counts"],
        "slots": [pb.SlotTokens(tokens=tokens) for tokens in bank["slots"] or ()],
        "prefill_balancedness": bank["phases"]["prefill"],
        "decode_balancedness": bank["phases"]["decode"],
    }
    return _message(pb.BankLoad, values)
