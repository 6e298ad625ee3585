"""Planted bugs that only requests, or clusters, with a feature bring to light."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from msgspec.structs import replace

from gateway.engines.submission import Submission
from gateway.text.detokenizer import StopStrings
from tests.simulation.planted import MANY, Bug
from workers.engine import engine, step_sampler
from workers.engine.engine import Engine
from workers.engine.scheduler import Scheduler
from workers.kv.transfer.store import Fetch, KvTransferStore
from workers.process.gateway_streams import GatewayStreams
from workers.requests import block_hash
from workers.requests.block_hash import root_hash
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


def _one_adapter() -> AbstractContextManager[object]:
    """The names of cached blocks do not depend on the adapter."""
    real = root_hash
    return mock.patch.object(block_hash, "root_hash", lambda *own: real(*own[:3]))


def _kept_use() -> AbstractContextManager[object]:
    """An adapter counts as in use by requests that have ended."""
    return mock.patch.object(Engine, "_stop_using", return_value=None)


@contextmanager
def _fresh_grammar() -> Iterator[None]:
    """The grammar of a request that goes on elsewhere begins anew."""
    real = engine.open_choices

    def begin(request: Any, grammar: Any, arrival: int, now: float) -> Any:
        found = real(request, grammar, arrival, now)
        for sequence in found:
            sequence.grammar = None if grammar is None else grammar.start()
        return found

    with mock.patch.object(engine, "open_choices", begin):
        yield


def _short_stops() -> AbstractContextManager[object]:
    """A stop string that is cut by the end of a token is not found."""
    return mock.patch.object(StopStrings, "_possible_start", lambda self, text: len(text))


@contextmanager
def _whole_abort() -> Iterator[None]:
    """A choice that a stop string ends takes the other choices with it."""
    real = Engine.abort

    def abort(self: Engine, request_id: str, choices: Any = ()) -> None:
        real(self, request_id)

    with mock.patch.object(Engine, "abort", abort):
        yield


FEATURE_BUGS: dict[str, Bug] = {
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
    "unheld_copy": Bug(_unheld_copy, _SLOW, MANY, features=("tiers",)),
}
"""By name."""
