"""Responses in the state folder, for each tenant separately."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Self

import msgspec

from cluster.core.errors import RequestError, UnknownNameError, UnsupportedParameterError
from cluster.disk.threads import DiskThreads
from gateway.core.errors import StorageError
from gateway.core.field_checks import check_length, require
from gateway.http.pagination import current_tenant
from gateway.responses.items import Item, response_id_of
from gateway.responses.resource import Resource
from gateway.state.store import ObjectKind, StateStore

KIND = ObjectKind("responses", "resp", drops_oldest=True)
"""Stored responses. If a limit is reached, the oldest are deleted so that new requests succeed."""
MAX_REFERENCED_RESPONSES = 256
"""Maximum number of responses that the item references of one request may name."""
_DISABLED = "is not supported: the server was started without --state-dir"


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response with the conversation before it, so that previous responses may be deleted.

    The fields are JSON text whose size is known before it is decoded.
    """

    response: msgspec.Raw
    history: list[msgspec.Raw]
    """Items of the previous responses."""
    input: list[msgspec.Raw]
    """Items of the request."""
    revision: str = ""
    """Revision of the model that made the response."""

    @property
    def conversation(self) -> list[msgspec.Raw]:
        """Items of the previous responses, of the request and of the output, in this order."""
        output = msgspec.json.decode(self.response, type=_Output).output
        return [*self.history, *self.input, *output]


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]


class _ItemId(msgspec.Struct):
    id: str


def encode_response(
    response: Resource, history: Iterable[Item], new_items: Iterable[Item], revision: str = ""
) -> StoredResponse:
    """Encode a response item by item so that other threads can run in between."""
    encode = msgspec.json.encode
    return StoredResponse(
        response=msgspec.Raw(encode(response)),
        history=[msgspec.Raw(encode(item)) for item in history],
        input=[msgspec.Raw(encode(item)) for item in new_items],
        revision=revision,
    )


def read_items(items: Iterable[msgspec.Raw]) -> list[Item]:
    """Decode stored items one by one so that other threads can run in between."""
    return [msgspec.json.decode(item) for item in items]


def id_of(item: msgspec.Raw) -> str:
    return msgspec.json.decode(item, type=_ItemId).id


class StoredReferences(NamedTuple):
    """References to stored items."""

    counts: Mapping[str, int]
    """Number of references to each item, by the item's id."""
    response_ids: Collection[str]
    """Ids of the responses that contain the items."""

    @classmethod
    def from_ids(cls, ids: Iterable[str]) -> Self:
        """Create references to the items ``ids``, which may contain duplicates."""
        counts = Counter(ids)
        return cls(counts, dict.fromkeys(filter(None, map(response_id_of, counts))))


class StoredItems(NamedTuple):
    items: list[Item]
    num_bytes: int
    """Size of the items' JSON in bytes."""
    revision: str = ""
    """Revision of the model that made the last response."""


def check_bytes(name: str, num_bytes: int, max_bytes: int) -> None:
    """Raise ``RequestError`` if the items that field ``name`` refers to exceed ``max_bytes``."""
    rule = f"refers to {num_bytes} bytes of stored items, at most {max_bytes} are allowed"
    require(num_bytes <= max_bytes, name, rule)


def _named_items(stored: StoredResponse, names: Collection[str]) -> dict[str, msgspec.Raw]:
    by_id = ((id_of(item), item) for item in stored.conversation)
    return {name: item for name, item in by_id if name in names}


class ResponseStore:
    """The stored responses of the tenant of the current request.

    Args:
        store: the state folder; None disables storage.
        disk: threads for access to the store.
    """

    def __init__(self, store: StateStore | None, disk: DiskThreads) -> None:
        self._store = store
        self._disk = disk

    def should_store(self, requested: bool | None) -> bool:
        """Whether to store a response, given the field ``store`` of the request.

        Raises ``UnsupportedParameterError`` if ``store`` is true but storage is disabled.
        """
        if requested and self._store is None:
            raise UnsupportedParameterError(f"store {_DISABLED}", "store")
        return self._store is not None and requested is not False

    def new_id(self) -> str:
        if self._store is None:
            return f"{KIND.prefix}_{uuid.uuid4().hex}"
        return self._store.new_id(KIND)

    async def save(
        self,
        response: Resource,
        history: Sequence[Item],
        new_items: Sequence[Item],
        revision: str = "",
    ) -> None:
        """Store a response of a revision of the model. Raises ``StorageError``."""
        store, owner = self._required_store, current_tenant()

        def write() -> None:
            stored = encode_response(response, history, new_items, revision)
            store.put(KIND, owner, response["id"], msgspec.json.encode(stored))

        await self._disk.run(write)

    async def get(self, response_id: str) -> StoredResponse:
        """Return a stored response. Raises ``UnknownNameError`` if it does not exist."""
        stored = await self._find(response_id)
        if stored is None:
            raise UnknownNameError(f"there is no response {response_id[:64]!r}")
        return stored

    async def previous(self, response_id: str, max_bytes: int) -> StoredItems:
        """Return the conversation that a request continues. Raises ``RequestError``.

        Args:
            response_id: id of the last response of the conversation.
            max_bytes: maximum size of the items as JSON.
        """
        name = "previous_response_id"
        if self._store is None:
            raise UnsupportedParameterError(f"{name} {_DISABLED}", name)
        stored = await self._find(response_id)
        if stored is None:
            message = f"{name} ({response_id[:64]!r}) must be the id of a stored response"
            raise RequestError(message, name, "previous_response_not_found")

        def read() -> StoredItems:
            items = stored.conversation
            num_bytes = sum(map(len, items))
            check_bytes(name, num_bytes, max_bytes)
            return StoredItems(read_items(items), num_bytes, stored.revision)

        return await asyncio.to_thread(read)

    async def items(
        self, references: StoredReferences, path: str, max_bytes: int
    ) -> dict[str, Item]:
        """Return the referenced items that are stored, by id. Raises ``RequestError``.

        Args:
            references: the references.
            path: name of the field that has the references.
            max_bytes: maximum size of the items as JSON; repeated references count each time.
        """
        counts, response_ids = references
        if counts and self._store is None:
            raise UnsupportedParameterError(f"{path}: item_reference {_DISABLED}", path)
        check_length(
            path, len(response_ids), MAX_REFERENCED_RESPONSES, "responses in item references"
        )
        raw_items, num_bytes = dict[str, msgspec.Raw](), 0
        for response_id in response_ids:
            stored = await self._find(response_id)
            if stored is None:
                continue
            named = await asyncio.to_thread(_named_items, stored, counts.keys() - raw_items.keys())
            raw_items |= named
            num_bytes += sum(counts[one] * len(item) for one, item in named.items())
            check_bytes(path, num_bytes, max_bytes)

        def read() -> dict[str, Item]:
            return dict(zip(raw_items, read_items(raw_items.values()), strict=True))

        return await asyncio.to_thread(read) if raw_items else {}

    async def delete(self, response_id: str) -> None:
        """Delete a stored response. Raises ``UnknownNameError`` if it does not exist."""
        store = self._store
        if store is None or not await self._disk.run(
            store.delete, KIND, current_tenant(), response_id
        ):
            raise UnknownNameError(f"there is no response {response_id[:64]!r}")

    @property
    def _required_store(self) -> StateStore:
        assert self._store is not None, "save() requires that should_store() returned True"
        return self._store

    async def _find(self, response_id: str) -> StoredResponse | None:
        store, owner = self._store, current_tenant()
        if store is None:
            return None

        def read() -> StoredResponse | None:
            stored_object = store.get(KIND, owner, response_id)
            if stored_object is None:
                return None
            try:
                return msgspec.json.decode(stored_object.content, type=StoredResponse)
            except msgspec.MsgspecError as err:
                raise StorageError(f"the stored response {response_id} is damaged") from err

        return await self._disk.run(read)
