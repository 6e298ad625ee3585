"""Key files: keys with names and limits, reloaded when the file changes.

A file has one key per line (empty lines and ``#`` comments are ignored), or is YAML or JSON::

    keys:
      - name: team-a
        key: "a long random text"         # or sha256: its digest in hex
        requests_per_minute: 600
        tokens_per_minute: 100000
        max_concurrent: 16
        weight: 2                         # twice the share of other keys under contention
        models: [small]                   # names that requests may use; default: every model

A key may be given as ``sha256:`` and its digest in both formats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.config.api_keys import hash_key, is_hashed, stored_digest
from cluster.core.errors import ConfigError
from cluster.disk.threads import DiskThreads

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 * 1024 * 1024
_POLL_S = 1.0
_READ_LIMIT_S = 2.0
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
_MOST = 10**12
_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyLimits:
    """Limits of one key in one gateway replica; None is no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Prompt and output tokens per minute."""
    max_concurrent: int | None = None

    def with_defaults(self, other: KeyLimits) -> KeyLimits:
        """These limits, with the values of ``other`` as defaults."""
        values = {n: getattr(self, n) for n in _LIMITS}
        return KeyLimits(**{n: getattr(other, n) if v is None else v for n, v in values.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """One accepted key."""

    digest: bytes = field(repr=False)
    name: str = ""
    """Name in logs; may be empty."""
    limits: KeyLimits = KeyLimits()
    weight: float = 1.0
    """Weight of the key's share of the workers when keys compete."""
    models: tuple[str, ...] = ()
    """Names of the models and adapters that the key may use; empty: all. A model's name includes
    its adapters."""

    @property
    def tenant(self) -> str:
        """Name that identifies the client, for example for its prefix cache and stored objects."""
        return self.name or self.digest.hex()


def plain_entries(keys: Iterable[str]) -> tuple[KeyEntry, ...]:
    """Make entries without names and limits from keys, or from digests made by ``hash_key``."""
    return tuple(KeyEntry(digest=stored_digest(hash_key(key))) for key in keys)


def read_key_file(path: str, setting: str = "api_key_file") -> tuple[KeyEntry, ...]:
    """Read the keys in a file. Raises ``ConfigError``, which never shows the content."""
    try:
        raw = Path(path).read_bytes()[: MAX_FILE_BYTES + 1]
        text = raw.decode()
    except OSError as err:
        raise ConfigError(setting, path, f"cannot be read: {err.strerror}") from err
    except UnicodeDecodeError:
        raise ConfigError(setting, path, "cannot be read: it is not UTF-8 text") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(setting, path, f"must be at most {MAX_FILE_BYTES} bytes")
    lines = [s for line in text.splitlines() if (s := line.strip()) and not s.startswith("#")]
    if lines and (lines[0][0] in "{[" or lines[0].startswith("keys:")):
        entries = _entries(text, path, setting)
    else:
        for line in lines:
            _check_key(line, path, setting)
        entries = plain_entries(lines)
    _check_unique(entries, path, setting)
    return entries


def _entries(text: str, path: str, setting: str) -> tuple[KeyEntry, ...]:
    try:
        found = _load(text)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError):
        # the last two: PyYAML, for a value that its tag does not fit
        raise ConfigError(setting, path, "is neither YAML nor JSON") from None
    keys = found.get("keys") if isinstance(found, Mapping) else found
    keys = [] if keys is None else keys
    if not (isinstance(keys, list) and all(isinstance(one, Mapping) for one in keys)):
        raise ConfigError(setting, path, "must have a list 'keys' of mappings")
    return tuple(_entry(one, f"key {place}", path, setting) for place, one in enumerate(keys, 1))


def _load(text: str) -> Any:
    try:
        return json.loads(text)  # 100 times as fast as YAML
    except ValueError:
        return yaml.safe_load(text)


def _entry(found: Mapping[str, Any], what: str, path: str, setting: str) -> KeyEntry:
    unknown = sorted(
        map(str, found.keys() - {"name", "key", "sha256", "weight", "models", *_LIMITS})
    )
    if unknown:
        raise ConfigError(setting, path, f"{what}: {unknown[0][:64]} is not a known field")
    name = found.get("name", "")
    if not (isinstance(name, str) and len(name) <= 128 and name.isprintable()):
        raise ConfigError(setting, path, f"{what}: name must be a text of at most 128 characters")
    what = f"{what} ({name})" if name else what
    key, digest = found.get("key"), found.get("sha256")
    if (key is None) is (digest is None):
        raise ConfigError(setting, path, f"{what}: one of key and sha256 is required")
    if digest is not None:
        key = f"sha256:{str(digest).lower()}"
        if not is_hashed(key):
            raise ConfigError(setting, path, f"{what}: sha256 must be 64 hex digits")
    key = _check_key(key, path, setting, what)
    limits = {n: _limit(found[n], n, what, path, setting) for n in _LIMITS if n in found}
    weight = _limit(found.get("weight"), "weight", what, path, setting) or 1.0
    if not _MIN_WEIGHT <= weight <= _MAX_WEIGHT:
        rule = f"{what}: weight must be from {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}"
        raise ConfigError(setting, path, rule)
    models = found.get("models")
    is_list = isinstance(models, list) and all(isinstance(one, str) and one for one in models)
    if models is not None and not (is_list and models):
        raise ConfigError(setting, path, f"{what}: models must be a list of names")
    return KeyEntry(
        digest=stored_digest(hash_key(key)),
        name=name,
        limits=KeyLimits(**limits),
        weight=weight,
        models=tuple(models or ()),
    )


def _check_key(key: object, path: str, setting: str, what: str = "a key") -> str:
    if isinstance(key, str) and key and key.isascii() and key.isprintable() and " " not in key:
        return key
    rule = f"{what}: must be printable ASCII characters without spaces"
    raise ConfigError(setting, path, rule)


def _limit(value: object, name: str, what: str, path: str, setting: str) -> Any:
    kinds = (int,) if name == "max_concurrent" else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value <= _MOST):  # type: ignore[operator]
        raise ConfigError(setting, path, f"{what}: {name} must be a number above 0")
    return value


def _check_unique(entries: Iterable[KeyEntry], path: str, setting: str) -> None:
    for kind in ("digest", "name"):
        values = [value for entry in entries if (value := getattr(entry, kind))]
        if len(set(values)) < len(values):
            word = "key" if kind == "digest" else kind
            raise ConfigError(setting, path, f"has the same {word} twice")


class KeyFile:
    """A key file and its entries.

    Args:
        path: path of the file.
        setting: the option with this path, for errors.
        read: reads the file; called with path and setting.
        limit_s: longest time in seconds that requests wait for a changed file to be read.

    Raises:
        ConfigError: the file cannot be read, or is not a key file.
    """

    def __init__(
        self,
        path: str,
        setting: str = "api_key_file",
        read: Callable[[str, str], tuple[KeyEntry, ...]] = read_key_file,
        limit_s: float = _READ_LIMIT_S,
    ) -> None:
        self._path = Path(path)
        self._setting = setting
        self._read = read
        self._limit_s = limit_s
        self._seen = self._file_stamp()
        self._next_check_s = 0.0
        self._check_task: asyncio.Future[None] | None = None
        self._wait_ends_s = 0.0
        self._disk = DiskThreads(setting, 1, 1, limit_s)
        self.entries = self._by_digest()
        """Entries by digest. A reload replaces the whole mapping."""

    async def refresh(self, now_s: float) -> None:
        """Check the file for changes in a thread, at most once a second, and read a changed file.

        Waits for the check, at most ``limit_s`` from its start; former keys apply until it ends.
        An unreadable or invalid file is logged once, and the former keys remain valid. A file
        without keys removes all of them.
        """
        if self._check_task is not None and self._check_task.done():
            self._check_task = None
        if self._check_task is None and now_s >= self._next_check_s:
            self._next_check_s = now_s + _POLL_S
            self._wait_ends_s = now_s + self._limit_s
            self._check_task = asyncio.ensure_future(self._disk.run_to_completion(self._check_file))
        if self._check_task is not None and now_s <= self._wait_ends_s:
            await asyncio.wait({self._check_task}, timeout=self._wait_ends_s - now_s)

    def _check_file(self) -> None:
        stamp = self._file_stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self.entries = self._by_digest()
        except ConfigError as err:
            logger.error("could not reload keys; the former keys remain valid: %s", err)
        else:
            logger.info("reloaded %s: %d keys", self._setting, len(self.entries))

    def _by_digest(self) -> Mapping[bytes, KeyEntry]:
        return {entry.digest: entry for entry in self._read(str(self._path), self._setting)}

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)  # follows links, which Kubernetes replaces
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
