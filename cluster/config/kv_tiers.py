"""The configuration's section for copies of KV blocks outside the pool."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.checks import check, check_each, is_not_negative

MAX_PATH = 1024
"""Most characters of a folder's path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvTiersSection:
    """Copies of KV blocks in host memory and on local disk."""

    kv_host_bytes: int = 0
    """Host memory of each attention worker for copies of KV blocks that its pool gives up, 8G say;
    they are restored where that is cheaper than computing them, as measured."""
    kv_disk_bytes: int = 0
    """Disk of each attention worker for copies of KV blocks; at least ``kv_host_bytes``. A worker
    goes on with what an earlier one of its rank has left there."""
    kv_disk_dir: str | None = None
    """Folder on a local disk of every node, for the copies on disk. They are as confidential as the
    prompts."""

    def __post_init__(self) -> None:
        check_each(self, "kv_host_bytes kv_disk_bytes", is_not_negative, "must not be negative")
        disk, host = self.kv_disk_bytes, self.kv_host_bytes
        rule = "needs kv_host_bytes: blocks reach the disk through host memory"
        check(not disk or host > 0, "kv_disk_bytes", disk, rule)
        rule = f"must be at least kv_host_bytes ({host}): the disk has copies of what is there"
        check(not disk or disk >= host, "kv_disk_bytes", disk, rule)
        check(not disk or self.kv_disk_dir is not None, "kv_disk_bytes", disk, "needs kv_disk_dir")
        folder = self.kv_disk_dir
        check(folder is None or disk > 0, "kv_disk_dir", folder, "needs kv_disk_bytes")
        rule = f"must be an absolute path of {MAX_PATH} characters at most"
        is_path = folder is None or (folder.startswith("/") and len(folder) <= MAX_PATH)
        check(is_path, "kv_disk_dir", folder, rule)
