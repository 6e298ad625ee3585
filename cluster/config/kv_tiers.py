"""Configuration of the tiers that copy KV blocks to host memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.checks import check, check_each, is_not_negative, is_positive

MAX_PATH = 1024
"""Maximum length of a folder's path in characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvTiersSection:
    """Copies of KV blocks in host memory and on a local disk."""

    kv_host_bytes: int = 0
    """Host memory of each attention worker for copies of KV blocks, for example 8G. A block is
    restored if that is measured to be faster than computing it."""
    kv_disk_bytes: int = 0
    """Disk space of each attention worker for copies of KV blocks; at least ``kv_host_bytes``.
    After a restart, workers reuse the copies on disk."""
    kv_disk_dir: str | None = None
    """Folder on a local disk of every node for these copies, which are as confidential as the
    prompts."""
    session_copies: bool = True
    """Copy the KV of sessions to the host memory (``kv_host_bytes``) of a second attention worker,
    on which the sessions continue if the first one is lost."""
    session_copy_bytes_per_s: float = 100e6
    """Maximum bytes per second of session copies that each worker receives."""

    def __post_init__(self) -> None:
        check_each(self, "kv_host_bytes kv_disk_bytes", is_not_negative, "must not be negative")
        check_each(self, "session_copy_bytes_per_s", is_positive, "must be positive")
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
