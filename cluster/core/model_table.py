"""The served models and their revisions: which serve, which load, and how requests divide.

``cluster.launch.models_actor`` keeps the table, in which each revision has a fleet of its own;
gateways follow it. A table is plain data (``to_plain``), so that it survives its keeper.

    load ──▶ LOADING ──▶ READY ──▶ RETIRING ──▶ (removed)          beside the active revision
    load ──▶ WAITING (requests wait, running ones end) ──▶ LOADING ──▶ READY, active    in its place
              the active revision meanwhile: READY ──▶ STOPPED ──▶ (LOADING again if that fails)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cluster.core.checks import check
from cluster.core.errors import ConflictError, ModelNotFoundError
from cluster.core.fleets import fleet_name

FIRST_REVISION = "1"
REVISION_HEADER = "x-model-revision"
"""HTTP header and gRPC metadata that names the revision of the model."""
_MAX_CHARS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RevisionState(Enum):
    WAITING = "WAITING"
    """Takes the place of the active revision once the running requests of that have ended."""
    LOADING = "LOADING"
    READY = "READY"
    RETIRING = "RETIRING"
    """Gets no new requests, and is removed once its running requests have ended."""
    STOPPED = "STOPPED"
    """Its workers have made room for another revision."""
    FAILED = "FAILED"


LOADING_STATES = (RevisionState.WAITING, RevisionState.LOADING)
"""States of revisions that will serve, if nothing fails."""


@dataclass(slots=True)
class Revision:
    """One revision of a model."""

    name: str
    fleet: str
    """Name of its fleet, see ``cluster.core.fleets``."""
    plan: dict[str, Any]
    """Its configuration and the facts of its checkpoint, for a start."""
    state: RevisionState = RevisionState.LOADING
    loaded_bytes: int = 0
    total_bytes: int = 0
    error: str = ""
    """Reason of the state ``FAILED``."""

    @property
    def may_serve(self) -> bool:
        return self.state in (RevisionState.READY, RevisionState.RETIRING)


@dataclass(slots=True)
class Canary:
    """A revision that gets a share of the new requests."""

    revision: str
    percent: float = 0.0
    """Share of the requests that nothing else decides, 0 to 100."""
    keys: tuple[str, ...] = ()
    """Names of API keys with requests for the revision."""


@dataclass(slots=True)
class ServedModelEntry:
    """A model with its revisions."""

    name: str
    active: str
    """Name of the revision of requests that nothing sends elsewhere."""
    revisions: list[Revision]
    previous: str = ""
    """Revision that was active before the last ``promote``; empty without one."""
    canary: Canary | None = None
    is_held: bool = False
    """Whether new requests wait, because the active revision is being replaced in its place."""
    highest: int = 1
    """Highest number that was the name of a revision: names of ended revisions are not reused."""

    def find(self, name: str) -> Revision:
        """Return a revision. Raises ``ModelNotFoundError``."""
        for revision in self.revisions:
            if revision.name == name:
                return revision
        text = f"the model {self.name} has no revision {name[:64]!r}"
        raise ModelNotFoundError(text, "revision")

    def new_name(self) -> str:
        """Return a name for a further revision: the next number."""
        numbers = [int(one.name) for one in self.revisions if one.name.isdecimal()]
        self.highest = max(self.highest, *numbers) + 1
        return str(self.highest)


@dataclass(slots=True)
class ModelTable:
    """All models. Every method that changes the table increments ``version``."""

    models: list[ServedModelEntry] = field(default_factory=list)
    cluster: str = ""
    """Id of the cluster: a table of another cluster is not continued."""
    version: int = 1
    num_fleets: int = 0
    """Number of fleets so far: each gets a new name."""

    def __iter__(self) -> Iterator[tuple[ServedModelEntry, Revision]]:
        """Yield each revision with its model."""
        for model in self.models:
            for revision in model.revisions:
                yield model, revision

    def ready_actives(self) -> Iterator[tuple[ServedModelEntry, Revision]]:
        """Yield each active revision that is ready, with its model."""
        for model, revision in self:
            if (revision.name, revision.state) == (model.active, RevisionState.READY):
                yield model, revision

    def find(self, name: str) -> ServedModelEntry:
        """Return a model. Raises ``ModelNotFoundError``."""
        for model in self.models:
            if model.name == name:
                return model
        raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")

    def new_fleet(self) -> str:
        """Return the name of a new fleet."""
        self.num_fleets += 1
        return fleet_name(self.num_fleets - 1)

    def changed(self) -> None:
        self.version += 1

    def check_load(
        self, model: str, revision: str, in_place: bool, is_canary: bool = False
    ) -> None:
        """Check that a revision can be loaded now. Raises ``ConfigError`` and ``ConflictError``."""
        rule = "must be up to 64 letters, digits, ., _ and -"
        check(not revision or bool(_NAME.fullmatch(revision)), "revision", revision, rule)
        is_name = 0 < len(model) <= _MAX_CHARS and model.isprintable()
        check(is_name, "model", model[:_MAX_CHARS], f"must be up to {_MAX_CHARS} characters")
        if not any(one.name == model for one in self.models):
            check(not in_place, "in_place", in_place, f"needs a served model, {model} is none")
            return
        entry = self.find(model)
        if not entry.active:
            raise ConflictError(f"{model} is being unloaded")
        if is_canary and revision == entry.active:
            raise ConflictError(f"revision {revision} of {model} is active: it has all requests")
        for one in entry.revisions:
            if one.name == revision and one.state is not RevisionState.FAILED:
                raise ConflictError(f"{model} has a revision {revision} already: {one.state.value}")
            if one.state in LOADING_STATES:
                raise ConflictError(f"revision {one.name} of {model} is being loaded")

    def add(
        self, model: str, revision: str, fleet: str, plan: dict[str, Any], in_place: bool
    ) -> Revision:
        """Add a revision that is to be loaded; the model, too, if it is not served yet."""
        state = RevisionState.WAITING if in_place else RevisionState.LOADING
        if not any(one.name == model for one in self.models):
            added = Revision(revision or FIRST_REVISION, fleet, plan, state)
            self.models.append(ServedModelEntry(model, added.name, [added]))
        else:
            entry = self.find(model)
            added = Revision(revision or entry.new_name(), fleet, plan, state)
            failed = [one for one in entry.revisions if one.name == added.name]
            entry.revisions = [one for one in entry.revisions if one not in failed] + [added]
            entry.is_held = entry.is_held or in_place
        self.changed()
        return added

    def set_canary(
        self, model: str, revision: str, percent: float, keys: tuple[str, ...]
    ) -> ServedModelEntry:
        """Send a share of a model's new requests to a revision; 0 percent and no keys: none.

        Raises ``ConfigError``, ``ModelNotFoundError`` and ``ConflictError``.
        """
        check_percent(percent)
        entry = self.find(model)
        self._check_not_held(entry)
        found = entry.find(revision)
        if found.name == entry.active:
            raise ConflictError(f"revision {revision} of {model} is active: it has all requests")
        if found.state not in (RevisionState.READY, RevisionState.LOADING):
            raise ConflictError(f"revision {revision} of {model} is {found.state.value}")
        entry.canary = Canary(revision, percent, keys) if percent or keys else None
        self.changed()
        return entry

    def promote(self, model: str, revision: str = "") -> ServedModelEntry:
        """Make a revision active: the named one, by default the canary or the only other one.

        The revision that was active stays, for ``rollback``. Raises ``ConflictError`` and
        ``ModelNotFoundError``.
        """
        entry = self.find(model)
        self._check_not_held(entry)
        found = entry.find(revision) if revision else self._candidate(entry)
        if found.name == entry.active:
            raise ConflictError(f"revision {found.name} of {model} is active already")
        if found.state is not RevisionState.READY:
            raise ConflictError(f"revision {found.name} of {model} is {found.state.value}")
        entry.previous, entry.active, entry.canary = entry.active, found.name, None
        self.changed()
        return entry

    def _candidate(self, entry: ServedModelEntry) -> Revision:
        if entry.canary is not None:
            return entry.find(entry.canary.revision)
        others = [
            one
            for one in entry.revisions
            if one.name not in (entry.active, entry.previous) and one.state is RevisionState.READY
        ]
        if len(others) != 1:
            what = "several are ready" if others else "no other one is ready"
            raise ConflictError(f"name a revision of {entry.name}: {what}")
        return others[0]

    def rollback(self, model: str) -> Revision | None:
        """Undo the last step: end a canary, or make the previous revision active again.

        The revision that loses its requests is retired. If the previous one was replaced in its
        place, it takes its place again, and is returned: it needs a new fleet. Raises
        ``ConflictError``.
        """
        entry = self.find(model)
        self._check_not_held(entry)
        for one in entry.revisions:
            if one.state in LOADING_STATES:
                raise ConflictError(f"revision {one.name} of {model} is being loaded")
        if entry.canary is not None:
            loser = entry.find(entry.canary.revision)
            entry.canary = None
        elif entry.previous and entry.find(entry.previous).state is RevisionState.STOPPED:
            entry.is_held = True
            returning = entry.find(entry.previous)
            self.set_state(entry, returning, RevisionState.WAITING)
            return returning
        elif entry.previous and entry.find(entry.previous).state is RevisionState.READY:
            loser = entry.find(entry.active)
            entry.active, entry.previous = entry.previous, ""
        else:
            raise ConflictError(
                f"{model} has neither a canary nor an earlier revision to return to"
            )
        self._retire(entry, loser)
        return None

    def _check_not_held(self, entry: ServedModelEntry) -> None:
        if entry.is_held:
            raise ConflictError(f"a revision of {entry.name} is being replaced")

    def unload(self, model: str, revision: str = "") -> ServedModelEntry:
        """Retire a revision other than the active one; without ``revision``, the whole model.

        Raises ``ConflictError`` for the active revision, and for the only model that serves.
        """
        entry = self.find(model)
        self._check_not_held(entry)
        if revision:
            found = entry.find(revision)
            if found.name == entry.active:
                raise ConflictError(f"revision {revision} of {model} is active: promote another")
            self._retire(entry, found)
            return entry
        if all(other is entry for other, _ in self.ready_actives()):
            raise ConflictError(f"{model} is the only model that serves: end the cluster instead")
        entry.active = ""
        for one in list(entry.revisions):
            self._retire(entry, one)
        return entry

    def _retire(self, entry: ServedModelEntry, revision: Revision) -> None:
        if entry.canary is not None and entry.canary.revision == revision.name:
            entry.canary = None
        if entry.previous == revision.name:
            entry.previous = ""
        revision.state = RevisionState.RETIRING
        self.changed()

    def remove(self, entry: ServedModelEntry, revision: Revision) -> None:
        """Remove a retired revision after its fleet; with the last one, also the model."""
        entry.revisions = [one for one in entry.revisions if one is not revision]
        self.models = [one for one in self.models if one.revisions]
        self.changed()

    def set_state(
        self, entry: ServedModelEntry, revision: Revision, state: RevisionState, error: str = ""
    ) -> None:
        revision.state, revision.error = state, error
        self.changed()

    def release(self, entry: ServedModelEntry, active: Revision) -> None:
        """Let requests of a model go on that has been replaced in its place, or has returned."""
        if active.name != entry.active:
            entry.previous = entry.active
        entry.active, entry.is_held = active.name, False
        self.changed()


def check_percent(percent: float) -> None:
    """Raise ``ConfigError`` unless this is a share in percent."""
    check(0 <= percent <= 100, "percent", percent, "must be from 0 to 100")


def cluster_id(token: str) -> str:
    """Return the id of the cluster with this cluster token."""
    return hashlib.sha256(token.encode()).hexdigest()
