"""The admin methods that load, promote and unload revisions of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from cluster.core.errors import NotReadyError, RequestError
from cluster.core.model_table import ModelTable, Revision, ServedModelEntry
from gateway.admin.calls import AdminCalls
from gateway.auth.auth import check_operator
from gateway.calls.gateway import Gateway
from gateway.cluster.table_follower import TableFollower
from protos import admin_pb2 as pb

_REVISIONS = "revisions of models"


class RevisionCalls:
    """The methods that concern the table of models, which any replica can serve."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def LoadRevision(self, request: pb.LoadRevisionRequest) -> pb.ServedModels:
        """Check a checkpoint, and begin to load it as a revision of a model."""
        _require_model(request.model)
        order = {
            "model": request.model,
            "path": request.path,
            "revision": request.revision,
            "settings": _plain(json_format.MessageToDict(request.settings)),
            "percent": request.percent,
            "keys": list(request.keys),
            "in_place": request.in_place,
        }
        return _message(await self._table.order("load", order))

    async def PromoteRevision(self, request: pb.PromoteRevisionRequest) -> pb.ServedModels:
        """Make a revision active or, with ``percent`` or ``keys``, give it a share of requests."""
        _require_model(request.model)
        named = {"model": request.model, "revision": request.revision}
        if request.HasField("percent") or request.keys:
            shares = {"percent": request.percent, "keys": tuple(request.keys)}
            return _message(await self._table.order("change", "set_canary", **named, **shares))
        return _message(await self._table.order("change", "promote", **named))

    async def RollbackRevision(self, request: pb.RollbackRevisionRequest) -> pb.ServedModels:
        """End a canary, or return to the previous revision."""
        _require_model(request.model)
        return _message(await self._table.order("change", "rollback", model=request.model))

    async def UnloadRevision(self, request: pb.UnloadRevisionRequest) -> pb.ServedModels:
        """Begin to unload a revision, or a whole model."""
        _require_model(request.model)
        named = {"model": request.model, "revision": request.revision}
        return _message(await self._table.order("change", "unload", **named))

    async def ListRevisions(self, request: pb.ListRevisionsRequest) -> pb.ServedModels:
        """Return all models with their revisions."""
        return _message(await self._table.order("table"))

    @property
    def _table(self) -> TableFollower:
        check_operator(self._gateway.admin_keys, _REVISIONS)
        table = self._gateway.shared.models.table
        if table is None:
            raise NotReadyError("this server does not keep a table of models")
        return table


NAMES = frozenset(name for name in vars(RevisionCalls) if name[0].isupper())
"""Names of the methods of ``RevisionCalls``."""


class AdminCallsByModel:
    """The admin methods of all models of a replica."""

    def __init__(self, gateway: Gateway) -> None:
        """``gateway``: the gateway of the first model."""
        self._models = gateway.shared.models
        self._revisions = RevisionCalls(gateway)
        self._calls: dict[Gateway, AdminCalls] = {}

    def of(self, name: str, model: str | None) -> Any:
        """Return the method ``name``, for the workers of a model; of the first one for None.

        Raises ``ModelNotFoundError``.
        """
        if name in NAMES:
            return getattr(self._revisions, name)
        gateway = self._models.find(model or None)
        if gateway not in self._calls:
            self._calls = {one: calls for one, calls in self._calls.items() if one in self._models}
            self._calls[gateway] = AdminCalls(gateway)
        return getattr(self._calls[gateway], name)


def _require_model(name: str) -> None:
    if not name:
        raise RequestError("model is required", "model", "missing_required_parameter")


def _plain(value: Any) -> Any:
    """Convert whole numbers of a ``Struct``, which are floats, to integers."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _message(table: ModelTable) -> pb.ServedModels:
    return pb.ServedModels(models=map(_model, table.models))


def _model(model: ServedModelEntry) -> pb.ServedModel:
    canary = model.canary
    return pb.ServedModel(
        name=model.name,
        active=model.active,
        previous=model.previous,
        canary=canary.revision if canary else "",
        percent=canary.percent if canary else 0.0,
        keys=canary.keys if canary else (),
        held=model.is_held,
        revisions=map(_revision, model.revisions),
    )


def _revision(revision: Revision) -> pb.Revision:
    return pb.Revision(
        name=revision.name,
        state=revision.state.value,
        path=revision.plan["config"]["model"]["path"],
        loaded_bytes=revision.loaded_bytes,
        total_bytes=revision.total_bytes,
        error=revision.error,
    )
