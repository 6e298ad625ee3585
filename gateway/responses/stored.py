"""Responses in the state folder, by the key of their client."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

from cluster.core.errors import RequestError, UnknownNameError, UnsupportedParameterError
from cluster.disk.threads import DiskThreads
from gateway.core.errors import StorageError
from gateway.core.field_checks import check_length
from gateway.http.pages import tenant
from gateway.responses.items import Item, response_of
from gateway.responses.resource import Resource
from gateway.state.store import ObjectKind, StateStore

KIND = ObjectKind("responses", "resp", drops_oldest=True)
"""A client that never looks at what was stored for it still gets its answers."""
MAX_REFERRED = 256
"""Responses whose items one request may refer to."""
_NEEDS = "is not supported: the server was started without --state-dir"


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response, and the conversation before it: each one can be continued by itself."""

    response: Resource
    history: list[Item]
    """Items of the responses before it."""
    input: list[Item]
    """Items of its own request."""

    @property
    def conversation(self) -> list[Item]:
        """All items, its output too."""
        return [*self.history, *self.input, *self.response["output"]]


class ResponseStore:
    """The stored responses of whoever sends the running request.

    Args:
        store: None stores nothing.
        disk: threads for it.
    """

    def __init__(self, store: StateStore | None, disk: DiskThreads) -> None:
        self._store = store
        self._disk = disk

    def stores(self, wanted: bool | None) -> bool:
        """Whether a response is stored, as ``store`` asks for it.

        Raises ``UnsupportedParameterError`` where it must be and cannot be.
        """
        if wanted and self._store is None:
            raise UnsupportedParameterError(f"store {_NEEDS}", "store")
        return self._store is not None and wanted is not False

    def new_id(self) -> str:
        """Id of a new response."""
        if self._store is None:
            return f"{KIND.prefix}_{uuid.uuid4().hex}"
        return self._store.new_id(KIND)

    async def save(self, found: StoredResponse) -> None:
        """Raises ``StorageError``."""
        store, owner, response_id = self._known, tenant(), found.response["id"]

        def write() -> None:
            store.put(KIND, owner, response_id, msgspec.json.encode(found))

        await self._disk.run(write)

    async def get(self, response_id: str) -> StoredResponse:
        """Raises ``UnknownNameError``."""
        found = await self._find(response_id)
        if found is None:
            raise UnknownNameError(f"there is no response {response_id[:64]!r}")
        return found

    async def previous(self, response_id: str) -> StoredResponse:
        """The response that a request continues. Raises ``RequestError``."""
        name = "previous_response_id"
        if self._store is None:
            raise UnsupportedParameterError(f"{name} {_NEEDS}", name)
        found = await self._find(response_id)
        if found is None:
            message = f"{name} ({response_id[:64]!r}) names no stored response"
            raise RequestError(message, name, "previous_response_not_found")
        return found

    async def items(self, ids: Sequence[str], path: str) -> dict[str, Item]:
        """The stored ones of some items, by id. Raises ``RequestError``."""
        if ids and self._store is None:
            raise UnsupportedParameterError(f"{path}: item_reference {_NEEDS}", path)
        found, wanted = dict[str, Item](), frozenset(ids)
        responses = dict.fromkeys(filter(None, map(response_of, ids)))
        check_length(path, len(responses), MAX_REFERRED, "responses in item references")
        for response_id in responses:
            stored = await self._find(response_id)
            items = stored.conversation if stored is not None else []
            found |= {item["id"]: item for item in items if item["id"] in wanted}
        return found

    async def delete(self, response_id: str) -> None:
        """Raises ``UnknownNameError``."""
        store = self._store
        if store is None or not await self._disk.run(store.delete, KIND, tenant(), response_id):
            raise UnknownNameError(f"there is no response {response_id[:64]!r}")

    @property
    def _known(self) -> StateStore:
        assert self._store is not None, "stores() was asked before"
        return self._store

    async def _find(self, response_id: str) -> StoredResponse | None:
        store, owner = self._store, tenant()
        if store is None:
            return None

        def read() -> StoredResponse | None:
            found = store.get(KIND, owner, response_id)
            if found is None:
                return None
            try:
                return msgspec.json.decode(found.content, type=StoredResponse)
            except msgspec.MsgspecError as err:
                raise StorageError(f"the stored response {response_id} is damaged") from err

        return await self._disk.run(read)
