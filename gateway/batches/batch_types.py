"""Response types of Files and Batches, for the OpenAPI document.

Handlers build plain dicts; a test fails on a field that is missing here.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from gateway.batches.objects import BatchStatus
from gateway.http.http_types import Count


class StoredFile(TypedDict):
    id: str
    object: Literal["file"]
    bytes: Count
    created_at: Count
    expires_at: Count
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class Problem(TypedDict):
    code: str
    message: str
    param: str | None
    line: Count | None


class Problems(TypedDict):
    object: Literal["list"]
    data: list[Problem]


class Counts(TypedDict):
    total: Count
    completed: Count
    failed: Count


class BatchObject(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: Problems | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: Count
    in_progress_at: Count | None
    expires_at: Count
    finalizing_at: Count | None
    completed_at: Count | None
    failed_at: Count | None
    expired_at: Count | None
    cancelling_at: Count | None
    cancelled_at: Count | None
    request_counts: Counts
    metadata: dict[str, str] | None


class FileList(TypedDict):
    object: Literal["list"]
    data: list[StoredFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
