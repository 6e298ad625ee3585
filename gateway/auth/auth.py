"""API keys: authenticate callers and limit their usage. ``/health`` and ``/ready`` need no key.

HTTP and gRPC check the ``KeyRing`` of their port before anything else, and store the caller in
``CALLER``.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar

from cluster.config.api_keys import digest_of
from cluster.config.gateway import GatewaySection
from cluster.core.errors import AuthenticationError, PermissionDeniedError
from gateway.auth.key_file import KeyEntry, KeyFile, KeyLimits, plain_entries
from gateway.auth.key_limits import KeyUsage

CALLER: ContextVar[KeyUsage | None] = ContextVar("CALLER", default=None)
"""Caller of the request that the current task serves; None if the port requires no key."""

NUMBERS_BY_EXPERT, EVENTS = "numbers by expert and layer", "events of the cluster"
LOGS = "logs of processes"
"""Names of what only operators may see, for ``check_operator``."""


class KeyRing:
    """Authenticates callers by the keys of a port; a port without keys accepts every caller.

    Args:
        keys: plain keys, or digests made by ``cluster.config.api_keys.hash_key``.
        file: further keys, reloaded when the file changes.
        limits: default limits of a key.
        others: keys of another port, which ``check`` rejects with ``PermissionDeniedError``.
        are_admin: whether the keys are admin keys.
        clock: ``time.monotonic``.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        file: KeyFile | None = None,
        limits: KeyLimits | None = None,
        others: KeyRing | None = None,
        are_admin: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = {entry.digest: entry for entry in plain_entries(keys)}
        self._file = file
        self._limits = limits or KeyLimits()
        self._others = others
        self._are_admin = are_admin
        self.admin_ring: KeyRing | None = None
        """Keys that also open this port, without its limits."""
        self._clock = clock
        self._usages: dict[bytes, KeyUsage] = {}  # by digest, of keys that were used

    @property
    def is_open(self) -> bool:
        """Whether the port requires no key. A key file closes the port, even an empty one."""
        return not self._fixed and self._file is None

    async def read_changes(self) -> None:
        """Reload the key files of this port. Call before ``check`` and ``enter``."""
        for ring in (self, self.admin_ring, self._others):
            if ring is not None and ring._file is not None:
                await ring._file.refresh(ring._clock())

    def check(self, authorization: str | None, api_key: str | None = None) -> KeyUsage | None:
        """Check the key in an ``Authorization`` header, or in a header with only the key.

        Returns the usage of the key, or None if the port requires no key.

        Raises:
            AuthenticationError: the key is missing or unknown.
            PermissionDeniedError: the key is for another port.
        """
        if self.is_open:
            return None
        key = _bearer(authorization) or api_key
        if not key:
            message = "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
            raise AuthenticationError(message)
        digest = digest_of(key)
        account = None if self.admin_ring is None else self.admin_ring._find(digest)
        account = account or self._find(digest)
        if account is not None:
            return account
        if self._others is not None and self._others._find(digest) is not None:
            raise PermissionDeniedError("an admin key is needed here: this key is not one")
        raise AuthenticationError("the API key is not known")

    def enter(self, authorization: str | None, api_key: str | None = None) -> KeyUsage | None:
        """Call ``check``, set ``CALLER``, and count a running request until ``KeyUsage.leave``.

        Raises:
            KeyLimitError: the key has reached one of its limits. ``check`` raises other errors.
        """
        account = self.check(authorization, api_key)
        if account is not None:
            account.enter(self._clock())
        CALLER.set(account)
        return account

    def usage_of(self, tenant: str) -> KeyUsage | None:
        """Usage of the key with this tenant name; None if there is no such key."""
        in_file = self._file.entries.values() if self._file is not None else ()
        for entry in (*in_file, *self._fixed.values()):
            if entry.tenant == tenant:
                return self._find(entry.digest)
        return self.admin_ring.usage_of(tenant) if self.admin_ring is not None else None

    def _find(self, digest: bytes) -> KeyUsage | None:
        """Return the usage of a key, None if it is unknown. A reload of the file keeps usages."""
        entry = self._entry(digest)  # the time of this lookup depends on digests alone
        known = digest if entry is None else entry.digest
        if not hmac.compare_digest(digest, known) or entry is None:
            self._usages.pop(digest, None)
            return None
        account = self._usages.get(digest)
        if account is None:
            account = KeyUsage(entry, self._limits_of(entry), self._clock())
            account.is_admin = self._are_admin
            self._usages[digest] = account
        elif account.entry is not entry:
            account.change(entry, self._limits_of(entry), self._clock())
        return account

    def _entry(self, digest: bytes) -> KeyEntry | None:
        in_file = self._file.entries.get(digest) if self._file is not None else None
        return in_file or self._fixed.get(digest)

    def _limits_of(self, entry: KeyEntry) -> KeyLimits:
        return entry.limits.with_defaults(self._limits)


def is_operator(keys: KeyRing) -> bool:
    """Whether the current request may see hosts, processes and per-expert stats of the cluster.

    True if the port requires no key or the request has an admin key.
    """
    caller = CALLER.get()
    return keys.is_open or (caller is not None and caller.is_admin)


def check_operator(keys: KeyRing, what: str) -> None:
    """Raise ``PermissionDeniedError``, which names ``what``, unless ``is_operator``."""
    if not is_operator(keys):
        raise PermissionDeniedError(f"{what} need an admin key (--admin-key of the server)")


def make_key_rings(section: GatewaySection) -> tuple[KeyRing, KeyRing]:
    """Make the key rings of the public ports and of the admin ports.

    An admin key opens all ports, even if it is also a client key. Without admin keys, the admin
    ports listen on loopback only and accept the public keys. Raises ``ConfigError`` for an
    unreadable key file.
    """
    limits = KeyLimits(
        requests_per_minute=section.key_requests_per_minute,
        tokens_per_minute=section.key_tokens_per_minute,
        max_concurrent=section.key_max_concurrent,
    )
    api_file = _file(section.api_key_file, "api_key_file")
    public = KeyRing(section.api_keys, file=api_file, limits=limits)
    admin_file = _file(section.admin_key_file, "admin_key_file")
    admin = KeyRing(section.admin_keys, file=admin_file, others=public, are_admin=True)
    if admin.is_open:
        return public, public
    public.admin_ring = admin
    return public, admin


def _file(path: str | None, setting: str) -> KeyFile | None:
    return None if path is None else KeyFile(path, setting)


def _bearer(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
