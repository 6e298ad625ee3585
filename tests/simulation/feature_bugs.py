"""Planted bugs that only requests, or clusters, with a feature bring to light."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

from msgspec.structs import replace

from gateway.core.errors import StorageError
from gateway.engines.engine_client import EngineClient
from gateway.engines.hand_overs import HandOvers
from gateway.engines.submission import Submission
from gateway.state.files import as_storage_error
from gateway.state.record import encode
from gateway.state.store import StateStore
from gateway.text.detokenizer import StopStringFinder
from tests.simulation.planted import MANY, Bug
from workers.engine import engine_requests, step_sampler
from workers.engine.active_requests import ActiveRequests
from workers.engine.choices import open_choices
from workers.engine.engine import Engine
from workers.kv.tiers import disk
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.disk_writer import DiskWriter
from workers.kv.transfer.store import Fetch, KvTransferStore
from workers.process.control.membership import Membership
from workers.process.gateway_streams import GatewayStreams
from workers.process.roles.group_steps import GroupSteps
from workers.requests import block_hash
from workers.requests.block_hash import root_hash
from workers.scheduling.scheduler import Scheduler
from workers.speculation.speculator import Speculator

_KILLS = ("kill_worker", "kill_attention")
_SICK = ("fail_kv_disk", "kill_attention", "kill_worker")
_DISK = ("tiers", "tiers_on_disk")
_SLOW = ("pause_thread", "kill_attention", "full_buffers")


@contextmanager
def _in_so_far(change: Any) -> Iterator[None]:
    """Change what the next attempt at a request carries."""
    real = Submission.message

    def message(self: Submission, now_s: float) -> Any:
        return change(self, real(self, now_s))

    with mock.patch.object(Submission, "message", message):
        yield


def _moved_choices() -> AbstractContextManager[object]:
    """The next attempt carries the output of choices that go on in the places of the first ones."""

    def move(entry: Submission, request: Any) -> Any:
        kept = [tuple(entry.outputs[choice]) for choice in sorted(entry.open_choices)]
        return replace(request, output_so_far=(*kept, *[()] * (request.n - len(kept))))

    return _in_so_far(move)


def _lost_choice() -> AbstractContextManager[object]:
    """The next attempt leaves out choices that had no token yet, if others had."""

    def close(entry: Submission, request: Any) -> Any:
        empty = {c for c in entry.open_choices if any(entry.outputs) and not entry.outputs[c]}
        return replace(request, closed_choices=tuple(sorted({*request.closed_choices, *empty})))

    return _in_so_far(close)


@contextmanager
def _half_restore() -> Iterator[None]:
    """All blocks that were to come count as there, also where the transfer has failed."""
    real = KvTransferStore.end

    def end(self: KvTransferStore, fetch: Fetch) -> None:
        fetch.num_filled = len(fetch.blocks)
        real(self, fetch)

    with mock.patch.object(KvTransferStore, "end", end):
        yield


@contextmanager
def _unheld_copy() -> Iterator[None]:
    """Blocks are not held while they are copied: the next sequence may write to them."""

    def acquire(self: KvTransferStore, keys: Any) -> list[int]:
        return self.pool.find(keys)

    unreleased = mock.patch.object(KvTransferStore, "release", return_value=None)
    with unreleased, mock.patch.object(KvTransferStore, "acquire", acquire):
        yield


class _ShortDigest:
    """Of the first data alone."""

    def __init__(self, data: bytes) -> None:
        found = hashlib.sha256(data)
        self.digest, self.hexdigest = found.digest, found.hexdigest

    def update(self, data: bytes) -> None:
        """It does not depend on more."""


def _unchecked_file() -> AbstractContextManager[object]:
    """The checksum of a file of a block does not cover its bytes."""
    return mock.patch.object(disk, "hashlib", SimpleNamespace(sha256=_ShortDigest))


@contextmanager
def _any_identity() -> Iterator[None]:
    """Blocks on disk are restored whatever they were computed with."""
    real = DiskTier.use

    def use(self: DiskTier, identity: str) -> None:
        real(self, "any")

    with mock.patch.object(DiskTier, "use", use):
        yield


@contextmanager
def _needed_disk() -> Iterator[None]:
    """A worker whose disk cannot be used does not start."""
    real = DiskWriter.wait_opened

    def wait_opened(self: DiskWriter, timeout_s: float) -> None:
        real(self, timeout_s)
        if self.problem:
            raise OSError(self.problem)

    with mock.patch.object(DiskWriter, "wait_opened", wait_opened):
        yield


def _all_accepted() -> AbstractContextManager[object]:
    """Guesses are taken for tokens that were drawn."""
    return mock.patch.object(step_sampler, "num_accepted", lambda drafts, *more: len(drafts))


def _kept_guess() -> AbstractContextManager[object]:
    """What sequences were guessed to have next is kept after their ends."""
    return mock.patch.object(Speculator, "forget", return_value=None)


@contextmanager
def _uncopied_fork() -> Iterator[None]:
    """A beam that begins where another one is gets a block without what was computed."""
    real = Scheduler.fork

    def fork(self: Scheduler, parent: Any, child: Any) -> None:
        real(self, parent, child)

    with mock.patch.object(Scheduler, "fork", fork):
        yield


def _kept_stream() -> AbstractContextManager[object]:
    """Workers keep what they have for gateways that have died."""
    return mock.patch.object(GatewayStreams, "forget", return_value=None)


def _one_adapter() -> AbstractContextManager[object]:
    """The names of cached blocks do not depend on the adapter."""
    real = root_hash
    return mock.patch.object(block_hash, "root_hash", lambda *own: real(*own[:3]))


def _kept_use() -> AbstractContextManager[object]:
    """An adapter counts as in use by requests that have ended."""
    return mock.patch.object(ActiveRequests, "_stop_using", return_value=None)


@contextmanager
def _fresh_grammar() -> Iterator[None]:
    """The grammar of a request that goes on elsewhere begins anew."""

    def begin(request: Any, grammar: Any, arrival: int, now: float) -> Any:
        found = open_choices(request, grammar, arrival, now)
        for sequence in found:
            sequence.grammar = None if grammar is None else grammar.start()
        return found

    with mock.patch.object(engine_requests, "open_choices", begin):
        yield


def _short_stops() -> AbstractContextManager[object]:
    """A stop string that is cut by the end of a token is not found."""
    return mock.patch.object(StopStringFinder, "_possible_start", lambda self, text: len(text))


@contextmanager
def _whole_abort() -> Iterator[None]:
    """A choice that a stop string ends takes the other choices with it."""
    real = Engine.abort

    def abort(self: Engine, request_id: str, choices: Any = ()) -> None:
        real(self, request_id)

    with mock.patch.object(Engine, "abort", abort):
        yield


@contextmanager
def _silent_disk() -> Iterator[None]:
    """Clients are not told that their objects could not be stored."""
    real = StateStore.put

    def put(self: StateStore, *own: Any) -> None:
        with suppress(StorageError):
            real(self, *own)

    with mock.patch.object(StateStore, "put", put):
        yield


@contextmanager
def _in_place() -> Iterator[None]:
    """Objects are written in their places, and not beside them."""

    def put(self: StateStore, kind: Any, tenant: str, object_id: str, content: bytes) -> None:
        place = self._object_path(kind, tenant, object_id)
        assert place is not None
        raw = encode(object_id, content, self._clock(), self._clock() + self.ttl_s)
        with as_storage_error():
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(place, os.O_WRONLY | os.O_CREAT)
            try:
                while raw:
                    raw = raw[os.write(handle, raw[:1000]) :]
            finally:
                os.close(handle)

    with mock.patch.object(StateStore, "put", put):
        yield


@contextmanager
def _own_epoch() -> Iterator[None]:
    """An expert worker leaves an epoch with the first step group that leaves it."""
    real = Membership.follow_epoch

    def follow(self: Membership, header: Any, stall_s: float = 0.0, group: int = 0) -> None:
        self._group_epochs = dict.fromkeys(self._group_epochs, header.epoch)
        real(self, header, stall_s, group)

    with mock.patch.object(Membership, "follow_epoch", follow):
        yield


def _blocking_group() -> AbstractContextManager[object]:
    """An expert worker serves a step to its end before it looks at another step group."""

    def next_group(self: GroupSteps, *_: Any) -> int | None:
        return next(iter(self._deadlines), None)

    return mock.patch.object(GroupSteps, "_next_group", next_group)


def _unresumed() -> AbstractContextManager[object]:
    """A request that no decode worker has room for stays paused on its prefill worker."""
    real = HandOvers._hand_over

    def hand_over(self: HandOvers, entry: Any, source: EngineClient) -> None:
        if self._target(entry) is not None:
            real(self, entry, source)

    return mock.patch.object(HandOvers, "_hand_over", hand_over)


FEATURE_BUGS: dict[str, Bug] = {
    "blocking_group": Bug(_blocking_group, _KILLS, MANY, features=("groups",)),
    "unresumed": Bug(_unresumed, ("kill_in_hand_over",), features=("groups",)),
    "own_epoch": Bug(_own_epoch, ("rebalance", "slow_link"), MANY, features=("groups",)),
    "in_place": Bug(_in_place, ("fail_state", "kill_gateway"), features=("state", "restarts")),
    "silent_disk": Bug(_silent_disk, ("fail_state",), features=("state",)),
    "fresh_grammar": Bug(_fresh_grammar, _KILLS, features=("grammars",)),
    "kept_use": Bug(_kept_use, _KILLS, features=("adapters",)),
    "one_adapter": Bug(_one_adapter, _KILLS, features=("adapters",)),
    "short_stops": Bug(_short_stops, _KILLS, features=("grammars",)),
    "whole_abort": Bug(_whole_abort, _KILLS, features=("choices", "grammars")),
    "all_accepted": Bug(_all_accepted, _KILLS, features=("drafts",)),
    "kept_guess": Bug(_kept_guess, _KILLS, features=("drafts",)),
    "kept_stream": Bug(_kept_stream, ("kill_gateway",), features=("restarts",)),
    "uncopied_fork": Bug(_uncopied_fork, _KILLS, features=("beams",)),
    "half_restore": Bug(_half_restore, _SLOW, features=("tiers",)),
    "lost_choice": Bug(_lost_choice, _KILLS, features=("choices",)),
    "moved_choices": Bug(_moved_choices, _KILLS, features=("choices",)),
    "any_identity": Bug(_any_identity, _SICK, features=_DISK),
    "needed_disk": Bug(_needed_disk, _SICK, features=_DISK),
    "unchecked_file": Bug(_unchecked_file, _SICK, features=_DISK),
    "unheld_copy": Bug(_unheld_copy, _SLOW, MANY, features=("tiers",)),
}
"""By name."""
