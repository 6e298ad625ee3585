"""Which revision of a model serves a call: the named one, the session's, the canary, or the active.

A call runs on one revision. Calls of a session, and calls that continue a stored response, stay on
its revision while that serves.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.core.errors import ModelNotFoundError, NotReadyError, QueueFullError
from cluster.core.model_table import REVISION_HEADER, Canary
from gateway.auth.auth import CALLER
from gateway.core.call import GenerateCall

if TYPE_CHECKING:
    from gateway.calls.gateway import Gateway

_MAX_SESSIONS = 65_536
"""Maximum number of sessions for which a gateway remembers the revision; the latest ones."""
_MAX_SESSION_CHARS = 512
"""Maximum length of a session id that is remembered; calls are checked later."""
_GRAINS = 10_000
_REPLACED_RETRY_S = 5.0


@dataclass(slots=True)
class ModelRoute:
    """The revisions of one model that serve, and the division of calls among them."""

    name: str
    active: str
    """Revision of calls that nothing sends elsewhere."""
    revisions: dict[str, Gateway]
    """Gateways of the revisions that may get new calls."""
    canary: Canary | None = None
    standby: Gateway | None = None
    """Gateway of the replaced revision, which describes the model while no revision serves."""
    num_held: int = 0
    """Number of calls that wait while the model is replaced."""
    _sessions: OrderedDict[tuple[str, str], str] = field(default_factory=OrderedDict)
    """Revision of each session, by tenant and session id."""
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _is_ending: bool = False

    def __post_init__(self) -> None:
        self._released.set()

    @property
    def gateway(self) -> Gateway:
        """Gateway of the active revision, or else of any other one.

        Raises ``NotReadyError`` while no revision serves.
        """
        found = self.revisions.get(self.active) or next(iter(self.revisions.values()), None)
        if (found := found or self.standby) is None:
            raise self._replaced()
        return found

    @property
    def is_held(self) -> bool:
        """Whether new calls wait for another revision."""
        return not self._released.is_set()

    def knows(self, name: str) -> bool:
        """Whether this is the name of the model, or of an adapter that the caller may use."""
        return name == self.name or self._with(name) is not None

    def _with(self, name: str) -> Gateway | None:
        """Return the gateway of a revision that has an adapter, the active one first."""
        gateways = (self.revisions.get(self.active), *self.revisions.values(), self.standby)
        return next((g for g in gateways if g is not None and g.model.knows(name)), None)

    def update(
        self,
        active: str,
        revisions: Mapping[str, Gateway],
        canary: Canary | None = None,
        standby: Gateway | None = None,
        *,
        is_held: bool = False,
    ) -> None:
        """Replace the revisions. New calls wait while ``is_held``."""
        self.active, self.revisions, self.canary = active, dict(revisions), canary
        self.standby = standby
        if is_held and not self._is_ending:
            self._released.clear()
        else:
            self._released.set()

    async def wait_released(self, limit_s: float, max_held: int) -> None:
        """Wait while the model is replaced in its place.

        Raises ``NotReadyError`` after ``limit_s`` seconds, and ``QueueFullError`` if ``max_held``
        calls wait already.
        """
        if self._released.is_set():
            return
        if self.num_held >= max_held:
            message = f"{self.num_held} calls wait for the next revision of {self.name}"
            raise QueueFullError(f"{message}, at most {max_held}", _REPLACED_RETRY_S)
        self.num_held += 1
        try:
            await asyncio.wait_for(self._released.wait(), limit_s)
        except TimeoutError as err:
            raise self._replaced() from err
        finally:
            self.num_held -= 1

    def end_wait(self) -> None:
        """Let the calls go on that wait, and hold no further ones, as the replica shuts down."""
        self._is_ending = True
        self._released.set()

    def _replaced(self) -> NotReadyError:
        message = f"the model {self.name} is being replaced by another revision"
        return NotReadyError(message, "not_ready", _REPLACED_RETRY_S)

    def pick(self, call: GenerateCall) -> Gateway:
        """Return the gateway of the revision for a call.

        Raises ``ModelNotFoundError`` if the call names a revision that does not serve.
        """
        if call.revision is not None:
            if call.revision not in self.revisions:
                text = f"the model {self.name} has no revision {call.revision[:64]!r}"
                raise ModelNotFoundError(text, REVISION_HEADER)
            return self.revisions[call.revision]
        tenant = caller.entry.tenant if (caller := CALLER.get()) is not None else ""
        last = call.last_revision.removeprefix(f"{self.name}/")
        if last != call.last_revision and last in self.revisions:
            name = last
        elif call.session and self._sessions.get((tenant, call.session)) in self.revisions:
            name = self._sessions[tenant, call.session]
        else:
            name = self._draw(call.session, caller.entry.name if caller is not None else "")
        if 0 < len(call.session) <= _MAX_SESSION_CHARS:
            self._sessions[tenant, call.session] = name
            self._sessions.move_to_end((tenant, call.session))
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        gateway = self.revisions.get(name) or self.gateway
        if call.model is not None and not gateway.model.knows(call.model):
            return self._with(call.model) or gateway  # an adapter that is not loaded everywhere
        return gateway

    def _draw(self, session: str, key: str) -> str:
        """Return the canary's or the active revision; all gateways agree on a session."""
        canary = self.canary
        if canary is None or canary.revision not in self.revisions:
            return self.active
        share = random.random()
        if session:
            share = zlib.crc32(session.encode()) % _GRAINS / _GRAINS
        is_meant = (key and key in canary.keys) or share * 100 < canary.percent
        return canary.revision if is_meant else self.active
