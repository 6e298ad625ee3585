"""Planted bugs that only requests, or clusters, with a feature bring to light."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from msgspec.structs import replace

from gateway.engines.submission import Submission
from tests.simulation.planted import MANY, Bug
from workers.engine import step_sampler
from workers.engine.scheduler import Scheduler
from workers.kv.transfer.store import Fetch, KvTransferStore
from workers.process.gateway_streams import GatewayStreams
from workers.speculation.speculator import Speculator

_KILLS = ("kill_worker", "kill_attention")
_SLOW = ("pause_thread", "kill_attention", "full_buffers")


@contextmanager
def _in_so_far(change: Any) -> Iterator[None]:
    """Change what the next attempt at a request carries."""
    real = Submission.so_far
    with mock.patch.object(Submission, "so_far", lambda self: change(self, real(self))):
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

    def lend(self: KvTransferStore, keys: Any) -> list[int]:
        return self.pool.find(keys)

    unreleased = mock.patch.object(KvTransferStore, "end_loan", return_value=None)
    with unreleased, mock.patch.object(KvTransferStore, "lend", lend):
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


FEATURE_BUGS: dict[str, Bug] = {
    "all_accepted": Bug(_all_accepted, _KILLS, features=("drafts",)),
    "kept_guess": Bug(_kept_guess, _KILLS, features=("drafts",)),
    "kept_stream": Bug(_kept_stream, ("kill_gateway",), features=("restarts",)),
    "uncopied_fork": Bug(_uncopied_fork, _KILLS, features=("beams",)),
    "half_restore": Bug(_half_restore, _SLOW, features=("tiers",)),
    "lost_choice": Bug(_lost_choice, _KILLS, features=("choices",)),
    "moved_choices": Bug(_moved_choices, _KILLS, features=("choices",)),
    "unheld_copy": Bug(_unheld_copy, _SLOW, MANY, features=("tiers",)),
}
"""By name."""
