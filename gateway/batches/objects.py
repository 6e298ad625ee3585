"""Stored files and batches, and their representation for clients.

Source of the names: https://developers.openai.com/api/reference/resources/batches and ``/files``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import msgspec

from gateway.core.errors import StorageError
from gateway.state.store import ObjectKind

logger = logging.getLogger(__name__)

Stored = TypeVar("Stored")

FILES: Final = ObjectKind("files", "file")
BATCHES: Final = ObjectKind("batches", "batch")
MAX_FACTS_BYTES: Final = 16_384
"""Upper bound of the encoded metadata of a file."""
WINDOW_S: Final = 24 * 3600
"""Completion window of batches in seconds. OpenAI's API has no other one than ``24h``."""

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
FilePurpose = Literal["batch", "batch_output"]
ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of a file. Times are Unix times in seconds."""

    filename: str
    purpose: FilePurpose
    bytes: int
    created_at: int
    expires_at: int

    def to_response(self, file_id: str) -> dict[str, Any]:
        """Return the JSON object for clients."""
        return {
            "id": file_id,
            "object": "file",
            **msgspec.to_builtins(self),
            "status": "processed",
        }


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Reason why a batch failed."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Number of requests of a batch, by state."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether every request has a response."""
        return self.completed + self.failed >= self.total


class StoredBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are Unix times in seconds, None until reached."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus = "validating"
    errors: list[BatchError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    output_ttl_s: int | None = None
    """Retention of the output files in seconds; None selects the default."""

    def to_response(self) -> dict[str, Any]:
        """Return the JSON object for clients, with output files once the batch has ended."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        del found["output_ttl_s"]
        if self.status not in ENDED:
            found["output_file_id"] = found["error_file_id"] = None
        problems = found["errors"]
        found["errors"] = {"object": "list", "data": problems} if problems else None
        return {"object": "batch", **found}


def encode_file(facts: FileFacts, content: bytes) -> bytes:
    """Encode the metadata and content of a file as one stored object."""
    return msgspec.json.encode(facts) + b"\n" + content


def decode_file(raw: bytes, file_id: str) -> tuple[FileFacts, bytes]:
    """Decode a file; ``raw`` may end within the content. Raises ``StorageError``."""
    line, _, content = raw.partition(b"\n")
    try:
        return msgspec.json.decode(line, type=FileFacts), content
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise StorageError(f"the stored file {file_id} is damaged") from err


def decode_batch(raw: bytes, batch_id: str) -> StoredBatch:
    """Decode a batch. Raises ``StorageError``."""
    try:
        return msgspec.json.decode(raw, type=StoredBatch)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise StorageError(f"the stored batch {batch_id} is damaged") from err


def read_or_none(
    read: Callable[[str, str], Stored | None], tenant: str, object_id: str
) -> Stored | None:
    """Call ``read`` for one object. If the object is damaged, log it and return None."""
    try:
        return read(tenant, object_id)
    except StorageError as err:
        logger.error("could not list %s: %s", object_id, err)
        return None
