"""What turns leave is copied between steps, and never keeps a step from its blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.local_engine import LocalEngine
from tests.harness.threads import fail_to_start
from tests.reference.goldens import Golden
from tests.workers.kv.transfer.test_store import (
    NUM_BLOCKS,
    PROMPT,
    engine_of,
    forget_states,
    request_of,
    serve,
)
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.index import TierTurn
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer import turn_copier
from workers.kv.transfer.block_provider import KvBlockProvider, ProvidedCopy, ProvidedItem
from workers.kv.transfer.turn_copier import TurnCopier
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import block_hashes, state_key

MIB = 2**20
LONG = replace(request_of().params, max_tokens=40)


class Copying:
    """An engine that copies into host memory."""

    def __init__(self, local: LocalEngine, host_bytes: int = MIB) -> None:
        self.local = local
        self.engine = local.engine
        self.tiers = KvTiers(HostTier(host_bytes))
        self.woken = threading.Event()
        self.copies: TurnCopier = self.engine.start_tier_copies(self.tiers, self.woken.set)

    def settle(self) -> None:
        while not self.copies.is_idle:
            assert self.woken.wait(TIMEOUT_S)
            self.woken.clear()
            self.copies.advance()
            self.engine.check_integrity()
        self.tiers.host.check_integrity()

    def hold_reads(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """No block is copied before this is set."""
        may_read, read = threading.Event(), self.engine.cache.read_block

        def slow(block: int) -> Tensor:
            assert may_read.wait(TIMEOUT_S)
            return read(block)

        monkeypatch.setattr(self.engine.cache, "read_block", slow)
        return may_read

    @property
    def num_copied(self) -> int:
        """Blocks of the prompt that are in host memory."""
        return len(self.tiers.run(block_hashes(request_of(), 16, None)))

    @property
    def num_skipped(self) -> int:
        return self.tiers.host.num_skipped


@pytest.fixture
def copying(tiny_checkpoint: Path) -> Iterator[Copying]:
    found = Copying(engine_of(tiny_checkpoint, num_blocks=16))
    yield found
    found.copies.close()
    found.tiers.close()


def test_a_turn_is_copied_in_pieces(copying: Copying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_copier, "MAX_HELD", 1)
    serve(copying.local, request_of())
    copying.settle()
    assert copying.num_copied == NUM_BLOCKS
    assert copying.num_skipped == 0
    assert copying.engine.pool.num_free == copying.engine.pool.num_blocks


def test_only_a_few_blocks_are_held_meanwhile(copying: Copying) -> None:
    serve(copying.local, request_of())
    copying.copies.advance()
    pool = copying.engine.pool
    assert pool.num_blocks - pool.num_free == pool.num_blocks // 8
    copying.settle()


def test_what_is_gone_before_its_turn_is_left_out(copying: Copying) -> None:
    serve(copying.local, request_of())
    pool = copying.engine.pool
    pool.forget(pool.find(block_hashes(request_of(), 16, None))[1:])
    copying.settle()
    assert copying.num_copied == 1
    assert copying.num_skipped == NUM_BLOCKS  # three of the prompt, one of the output


def test_a_tier_that_is_full_of_the_same_turn_keeps_its_beginning(tiny_checkpoint: Path) -> None:
    local = engine_of(tiny_checkpoint, num_blocks=16)
    copying = Copying(local, 2 * local.engine.cache.block_bytes)
    serve(local, request_of())
    copying.settle()
    assert copying.num_copied == 2
    assert copying.num_skipped == NUM_BLOCKS + 1 - 2
    copying.copies.close()


def test_too_many_turns_are_left_out(copying: Copying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_copier, "MAX_TURNS", 1)
    serve(copying.local, request_of())
    serve(copying.local, request_of("other", prompt=PROMPT[::-1]))
    copying.settle()
    assert copying.num_copied == NUM_BLOCKS
    assert copying.num_skipped == NUM_BLOCKS + 1


def test_blocks_that_the_tier_has_are_not_skipped(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_copier, "MAX_TURNS", 1)
    serve(copying.local, request_of())
    copying.settle()
    serve(copying.local, request_of("other", prompt=PROMPT[::-1]))
    serve(copying.local, request_of("again"))  # no room in the queue
    copying.settle()
    assert copying.num_skipped == 0


def test_a_turn_that_cannot_be_ended_does_not_end_the_worker(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(turn: TierTurn) -> None:
        raise MemoryError

    monkeypatch.setattr(copying.tiers, "end", fail)
    serve(copying.local, request_of())
    copying.settle()
    assert copying.engine.pool.num_free == copying.engine.pool.num_blocks


def test_turns_are_copied_at_the_limit_of_threads(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_start(monkeypatch, "kv-copier")
    serve(copying.local, request_of())
    copying.settle()
    assert copying.num_copied == NUM_BLOCKS


def test_what_must_be_forgotten_meanwhile_is_not_kept(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = copying.hold_reads(monkeypatch)
    serve(copying.local, request_of())
    copying.copies.advance()
    pool = copying.engine.pool
    pool.forget(pool.find(block_hashes(request_of(), 16, None)))
    may_read.set()
    copying.settle()
    assert copying.num_copied == 0
    assert copying.tiers.host.num_bytes == 0
    assert pool.num_free == pool.num_blocks


def test_a_prompt_is_copied_while_its_sequence_runs(copying: Copying) -> None:
    """Nothing can take its blocks meanwhile; its output follows at the end."""
    local = copying.local
    local.add_request(replace(request_of(), params=LONG))
    while copying.num_copied < NUM_BLOCKS:
        assert local.engine.has_work
        local.step()
        copying.settle()
    assert local.engine.stats()["num_requests_running"] == 1
    while local.engine.has_work:
        local.step()
    copying.settle()
    assert copying.num_skipped == 0
    num_blocks = (len(PROMPT) + LONG.max_tokens - 1) // 16
    block_bytes = copying.engine.cache.block_bytes
    assert copying.tiers.host.num_bytes == num_blocks * block_bytes
    assert copying.engine.pool.num_free == copying.engine.pool.num_blocks


def test_blocks_that_are_copied_at_the_end_keep_what_their_request_said(copying: Copying) -> None:
    """Nobody has let go of them by then."""
    local = copying.local
    request = replace(request_of(), params=replace(LONG, max_tokens=2), cache_ttl_s=60.0)
    local.add_request(request)
    local.step()
    copying.copies.advance()
    pool = local.engine.pool
    while local.engine.has_work:
        local.step()
    assert pool.num_free < pool.num_blocks, "on their way to host memory"
    copying.settle()
    assert pool.num_free == pool.num_blocks
    assert local.engine.stats()["kv_blocks_kept"] == NUM_BLOCKS


def test_a_turn_may_leave_less_than_its_prompt(copying: Copying) -> None:
    """The last recurrent state that is known may be before the end of the prompt."""
    local = copying.local
    local.add_request(request_of())
    local.step()
    (sequence,) = local.engine._scheduler.queues.running
    copying.copies.advance()
    hints = KeepHints()
    names = block_hashes(request_of(), 16, None)
    copying.copies.ended(sequence, TurnUse(names=names[:1], num_prompt=1, hints=hints))
    copying.settle()
    assert copying.num_copied == NUM_BLOCKS
    assert copying.num_skipped == 0
    local.engine.abort("r")


def test_turns_with_the_same_beginning_are_copied_once(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, blocks = copying.engine.cache.read_block, list[int]()

    def note(block: int) -> Tensor:
        blocks.append(block)
        return read(block)

    monkeypatch.setattr(copying.engine.cache, "read_block", note)
    local = copying.local
    for name in "ab":
        local.add_request(request_of(name))
    while local.engine.has_work:
        local.step()
    copying.settle()
    assert len(blocks) == len({*blocks}) == NUM_BLOCKS + 1


def test_turns_that_run_hold_a_half_of_host_memory(tiny_checkpoint: Path) -> None:
    local = engine_of(tiny_checkpoint, num_blocks=32)
    copying = Copying(local, 2 * (NUM_BLOCKS + 1) * local.engine.cache.block_bytes)
    for place, name in enumerate("ab"):
        prompt = (3 + place, *PROMPT[1:])
        local.add_request(replace(request_of(name), prompt=prompt, params=LONG))
    while local.engine.stats()["generation_tokens_total"] < 4:
        local.step()
        copying.settle()
    assert copying.tiers.host.num_bytes == NUM_BLOCKS * local.engine.cache.block_bytes
    while local.engine.has_work:
        local.step()
    copying.settle()
    assert copying.tiers.host.num_bytes > NUM_BLOCKS * local.engine.cache.block_bytes
    copying.copies.close()


def test_a_prompt_that_does_not_fit_is_left_while_its_sequence_runs(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_copier, "_RUNNING_SHARE", 9.0)
    local = engine_of(tiny_checkpoint, num_blocks=16)
    copying = Copying(local, 2 * local.engine.cache.block_bytes)
    local.add_request(replace(request_of(), params=LONG))
    while local.engine.has_work:
        local.step()
        copying.settle()
    assert copying.num_copied == 2
    copying.copies.close()


def test_several_turns_are_copied_at_a_time(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_copier, "MAX_BATCHES", 2)
    may_read = copying.hold_reads(monkeypatch)
    for place, name in enumerate("abc"):
        serve(copying.local, replace(request_of(name), prompt=(3 + place, *PROMPT[1:])))
    copying.copies.advance()
    pool = copying.engine.pool
    num_held = pool.num_blocks - pool.num_free
    copying.copies.advance()
    assert pool.num_blocks - pool.num_free == num_held == 2 + 1, "an eighth, and one of the next"
    may_read.set()
    copying.settle()


def test_a_preempted_sequence_leaves_nothing(tiny_checkpoint: Path) -> None:
    copying = Copying(engine_of(tiny_checkpoint, num_blocks=14))
    requests = [
        replace(request_of(f"r{i}"), prompt=(3 + i, *PROMPT[1:]), params=LONG) for i in range(4)
    ]
    copying.local.run(requests)
    assert copying.engine.stats()["num_preemptions_total"] > 0
    copying.settle()
    assert copying.engine.pool.num_free == copying.engine.pool.num_blocks
    copying.copies.close()


def acquire(lender: KvBlockProvider, keys: list[bytes]) -> list[ProvidedItem]:
    """What another worker would get, as the engine's thread answers."""
    found: list[list[ProvidedItem]] = []
    thread = threading.Thread(target=lambda: found.append(lender.acquire(keys)), daemon=True)
    thread.start()
    while not found:
        lender.serve_requests()
    thread.join(TIMEOUT_S)
    return found[0]


def test_a_peer_gets_what_only_a_tier_has(copying: Copying) -> None:
    serve(copying.local, request_of())
    copying.settle()
    names = block_hashes(request_of(), 16, None)
    pool, cache = copying.engine.pool, copying.engine.cache
    data = [cache.read_block(block) for block in pool.find(names)]
    pool.forget(pool.find(names)[1:])
    lender = KvBlockProvider(
        copying.engine.kv_store, lambda: None, timeout_s=TIMEOUT_S, tiers=copying.tiers
    )
    lent = acquire(lender, names)
    assert [type(item) for item in lent] == [int, *[ProvidedCopy] * (NUM_BLOCKS - 1)]
    for item, expected in zip(lent, data, strict=True):
        (found,) = lender.read(item)
        assert found.view(cache.dtype).view(cache.block_shape).equal(expected)
    lender.release(lent, len(lent))
    lender.serve_requests()
    copying.engine.check_integrity()
    copying.tiers.forget(names)
    with pytest.raises(ConnectionError, match="was evicted"):
        lender.read(lent[-1])


def test_a_peer_gets_a_state_that_only_a_tier_has(golden: Callable[[str], Golden]) -> None:
    local = engine_of(golden("qwen3next-base").path)
    copying = Copying(local, 64 * MIB)
    serve(local, request_of())
    copying.settle()
    names = block_hashes(request_of(), 16, None)
    states = copying.engine.states
    assert states is not None
    slot = states.hold_extra(names[-1])
    assert slot is not None
    expected = copying.engine.cache.read_state(slot)
    states.release_extra(slot)
    forget_states(local)
    lender = KvBlockProvider(
        copying.engine.kv_store, lambda: None, timeout_s=TIMEOUT_S, tiers=copying.tiers
    )
    (lent,) = acquire(lender, [*map(state_key, names[1:])])
    assert isinstance(lent, ProvidedCopy)
    place, data = lender.read(lent)
    assert int(place) == NUM_BLOCKS - 2
    assert data.view(expected.dtype).view(expected.shape).equal(expected)
    lender.release([lent], 1)
    lender.serve_requests()
    copying.engine.check_integrity()
    copying.copies.close()
