"""Requests wait for KV blocks of a peer; a peer that fails costs the time limit at most."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from tests.reference.exact import exact
from tests.reference.goldens import Golden
from tests.workers.kv.transfer.test_store import NUM_BLOCKS, PROMPT, engine_of, request_of, serve
from workers.engine.engine import Engine
from workers.kv.transfer.block_provider import KvBlockProvider, ProvidedItem
from workers.process.intake.commands import PrefetchRequested
from workers.process.intake.intake_request import IntakeRequest
from workers.process.intake.kv_fetches import MAX_FETCHING, KvFetches
from workers.requests.block_hash import HASH_BYTES, block_hashes, sequence_hashes
from workers.requests.request import Request
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_link import MAX_ITEMS, PeerEndpoint, PeerServer

LIMIT_S = 0.2


def identity(name: str, kv_cache_dtype: str = "auto") -> PeerIdentity:
    return PeerIdentity(
        name=name,
        role="attention",
        rank=0,
        checkpoint_id="abc",
        config_hash="cfg",
        kv_cache_dtype=kv_cache_dtype,
    )


def command(name: str, seed: int = 0, peer: str = "attention-0") -> IntakeRequest:
    prompt = (3 + seed, *PROMPT[1:])
    return add(replace(request_of(name), prompt=prompt, kv_peer=peer))


def add(request: Request, block_size: int = 16) -> IntakeRequest:
    """A request as its stream delivers it."""
    return IntakeRequest("g", request, 0.0, tuple(block_hashes(request, block_size, None)))


class Fetching:
    """An engine that fetches from ``address``; ``wait`` returns when a fetch has ended."""

    def __init__(self, engine: Engine, address: str, limit_s: float) -> None:
        self.engine = engine
        self._peer = PeerEndpoint(
            name="attention-0", address=address, me=identity("attention-1"), token=TOKEN
        )
        self._ended = threading.Semaphore(0)
        self.is_peer_gone = False
        self.late_s = 0.0
        """What the clock of the fetches is ahead of time."""
        self.fetches = KvFetches(
            engine, self._find, self._ended.release, limit_s, lambda: time.monotonic() + self.late_s
        )

    def _find(self, name: str) -> PeerEndpoint | None:
        return self._peer if name == self._peer.name and not self.is_peer_gone else None

    def wait(self) -> None:
        assert self.has_ended(TIMEOUT_S)

    def has_ended(self, timeout_s: float) -> bool:
        """Whether a fetch has ended within this time."""
        return self._ended.acquire(timeout=timeout_s)

    def check_free(self) -> None:
        self.engine.check_integrity()
        assert self.engine.pool.num_free == self.engine.pool.num_blocks


class Silent:
    """A peer that says nothing until it hangs up."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"

    def accept(self) -> socket.socket:
        """Wait for the next connection."""
        return self._listener.accept()[0]

    def hang_up(self) -> None:
        """End the next connection."""
        self.accept().close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        yield Silent(listener)


def failures(fetches: KvFetches) -> float:
    return fetches.stats()['kv_migration_failures_total{reason="prefix"}']


def test_requests_with_one_prefix_share_a_fetch(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    first, second, third = command("a"), command("b"), command("c")
    with closing(found.fetches) as fetches:
        assert all(fetches.put(one) for one in (first, second, third))
        fetches.drop("b")
        assert fetches.names == ["a", "c"]
        assert 0.0 < fetches.wait_s(2 * TIMEOUT_S) <= TIMEOUT_S
        assert fetches.take() == []
        silent.hang_up()
        found.wait()
        assert fetches.take() == [first, third]
        assert fetches.names == []
        assert fetches.wait_s(60.0) == 60.0
        assert failures(fetches) == 1
    found.check_free()


def test_a_silent_peer_costs_the_time_limit(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, LIMIT_S)
    only = command("a")
    with closing(found.fetches) as fetches:
        assert fetches.put(only)
        found.wait()
        assert fetches.take() == [only]
        assert failures(fetches) == 1
    found.check_free()


def test_no_request_waits_for_a_fetch_that_is_late(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    first = command("a")
    with closing(found.fetches) as fetches:
        assert fetches.put(first)
        connection = silent.accept()  # the fetch has looked at the clock
        found.late_s = TIMEOUT_S
        assert fetches.take() == [first]
        assert not fetches.put(command("b"))
        connection.close()
        found.wait()
        assert fetches.take() == []
    found.check_free()


def test_requests_without_a_known_peer_do_not_wait(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, LIMIT_S)
    with closing(found.fetches) as fetches:
        assert not fetches.put(command("a", peer=""))
        assert not fetches.put(command("a", peer="attention-7"))
        none = Fetching(found.engine, silent.address, 0.0)
        assert not none.fetches.put(command("a"))
        assert none.fetches.fetch_cost == float("inf")
    found.check_free()


def test_few_prefixes_are_fetched_at_a_time(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    with closing(found.fetches) as fetches:
        for seed in range(MAX_FETCHING):
            assert fetches.put(command(f"r{seed}", seed))
        assert not fetches.put(command("one more", MAX_FETCHING))
        for _ in range(MAX_FETCHING):
            silent.hang_up()
            found.wait()
        assert len(fetches.take()) == MAX_FETCHING
    found.check_free()


def test_a_prefix_on_its_way_counts_as_none_more(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    commands = [command(f"r{seed}", seed) for seed in range(MAX_FETCHING)]
    with closing(found.fetches) as fetches:
        for one in commands:
            assert fetches.put(one)
        late = command("late", 0)
        assert fetches.put(late)
        for _ in range(MAX_FETCHING):
            silent.hang_up()
            found.wait()
        assert late in fetches.take()
    found.check_free()


def test_a_request_that_joins_a_fetch_evicts_nothing(tiny_checkpoint: Path, silent: Silent) -> None:
    source = engine_of(tiny_checkpoint, num_blocks=3 * NUM_BLOCKS)
    serve(source, replace(request_of("cached"), prompt=(1, *PROMPT[1:])))
    pool = source.engine.pool
    found = Fetching(source.engine, silent.address, TIMEOUT_S)
    with closing(found.fetches) as fetches:
        assert fetches.put(command("a"))
        pool.take_changes()
        num_free = pool.num_free
        assert fetches.put(command("b"))
        assert pool.num_free == num_free
        assert pool.take_changes().removed == ()
        silent.hang_up()
        found.wait()
        assert len(fetches.take()) == 2
    found.check_free()


def test_a_request_joins_a_fetch_that_has_just_ended(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    with closing(found.fetches) as fetches:
        assert fetches.put(command("a"))
        silent.hang_up()
        found.wait()
        assert fetches.put(command("b"))
        assert [one.request.request_id for one in fetches.take()] == ["a", "b"]
    found.check_free()


def test_a_long_prefix_is_fetched_in_part(tiny_checkpoint: Path) -> None:
    length = MAX_ITEMS + 9
    section = EngineSection(block_size_tokens=1, kv_cache_bytes=length * 2 * 2 * 2 * 8 * 4)
    engine = LocalEngine(tiny_checkpoint, dtype="float32", section=section, max_model_len=128)
    asked: list[int] = []

    class NoBlocks:
        def acquire(self, keys: Sequence[bytes]) -> list[int]:
            asked.append(len(keys))
            return []

        def read(self, item: int) -> Sequence[Tensor]:
            raise AssertionError("nothing is lent")

        def release(self, items: list[int], num_kept: int) -> None:
            pass

    server = PeerServer(
        identity("attention-0"), TOKEN, host="127.0.0.1", what="kv-blocks", key_bytes=HASH_BYTES
    )
    server.start(NoBlocks())
    found = Fetching(engine.engine, server.address, TIMEOUT_S)
    prompt = (3,) * (MAX_ITEMS + 2)
    with closing(server), closing(found.fetches) as fetches:
        long = add(request_of("a", prompt=prompt, kv_peer="attention-0"), block_size=1)
        assert fetches.put(long)
        found.wait()
        assert fetches.take() == [long]
    assert asked == [MAX_ITEMS]
    found.check_free()


def test_blocks_that_came_are_found(tiny_checkpoint: Path) -> None:
    source = engine_of(tiny_checkpoint)
    serve(source, request_of("source"))
    asked = threading.Event()
    lender = KvBlockProvider(source.engine.kv_store, asked.set)
    server = PeerServer(
        identity("attention-0"), TOKEN, host="127.0.0.1", what="kv-blocks", key_bytes=HASH_BYTES
    )
    server.start(lender)
    target = engine_of(tiny_checkpoint)
    found = Fetching(target.engine, server.address, TIMEOUT_S)
    with closing(server), closing(found.fetches) as fetches:
        wanted = add(request_of("target", kv_peer="attention-0"))
        assert fetches.put(wanted)
        assert asked.wait(TIMEOUT_S)
        lender.serve_requests()
        found.wait()
        assert fetches.take() == [wanted]
    found.check_free()
    assert serve(target, request_of("target"))[0].num_cached_tokens == NUM_BLOCKS * 16


def test_blocks_of_another_cache_type_are_refused_by_name(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = engine_of(tiny_checkpoint)
    serve(source, request_of("source"))
    server = PeerServer(
        identity("attention-0", "fp8"),
        TOKEN,
        host="127.0.0.1",
        what="kv-blocks",
        key_bytes=HASH_BYTES,
    )
    server.start(KvBlockProvider(source.engine.kv_store, lambda: None))
    target = engine_of(tiny_checkpoint)
    found = Fetching(target.engine, server.address, TIMEOUT_S)
    with closing(server), closing(found.fetches) as fetches:
        wanted = add(request_of("target", kv_peer="attention-0"))
        assert fetches.put(wanted)
        found.wait()
        assert fetches.take() == [wanted]
        assert failures(fetches) == 1
    assert "KV cache type of attention-1 is auto, attention-0 has fp8" in caplog.text
    found.check_free()
    assert serve(target, request_of("target"))[0].num_cached_tokens == 0


class Asked(KvBlockProvider):
    """Counts the keys of each question, and answers it."""

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__(engine.engine.kv_store, lambda: None)
        self.num_keys: list[int] = []

    def acquire(self, keys: Sequence[bytes]) -> list[ProvidedItem]:
        self.num_keys.append(len(keys))
        return super().acquire(keys)


def fetch_prompt(source: LocalEngine, target: LocalEngine) -> list[int]:
    """Let a request wait for the blocks of its prompt; the questions that were asked for them."""
    lender = Asked(source)
    server = PeerServer(
        identity("attention-0"), TOKEN, host="127.0.0.1", what="kv-blocks", key_bytes=HASH_BYTES
    )
    server.start(lender)
    found = Fetching(target.engine, server.address, TIMEOUT_S)
    with closing(server), closing(found.fetches) as fetches:
        wanted = add(request_of("target", kv_peer="attention-0"))
        assert fetches.put(wanted)
        while not found.has_ended(0.01):
            lender.serve_requests()
        assert fetches.take() == [wanted]
        assert failures(fetches) == 0
    found.check_free()
    return lender.num_keys


def forget_states(engine: LocalEngine) -> None:
    """Those of the prompt."""
    states = engine.engine.states
    assert states is not None
    states.forget(block_hashes(request_of(), 16, None))


@pytest.mark.parametrize("place", ["both", "blocks", "source", "none"])
def test_one_question_decides_which_blocks_come(
    golden: Callable[[str], Golden], place: str
) -> None:
    """Where states are, and blocks."""
    source, target = (engine_of(golden("qwen3next-base").path) for _ in range(2))
    expected = exact(serve(source, request_of()))
    if place == "source":  # the target has the blocks alone
        serve(target, request_of())
        forget_states(target)
    if place == "blocks":  # the source has the blocks alone
        forget_states(source)
    if place == "none":  # both have the blocks alone
        serve(target, request_of())
        forget_states(source)
        forget_states(target)
    asked = fetch_prompt(source, target)
    assert asked == ([NUM_BLOCKS] * 2 if place == "both" else [NUM_BLOCKS])
    outputs = serve(target, request_of())
    comes = place in ("both", "source")
    assert outputs[0].num_cached_tokens == (NUM_BLOCKS * 16 if comes else 0)
    assert exact(outputs) == expected


@pytest.mark.parametrize("place", [NUM_BLOCKS, -1])
def test_a_state_of_none_of_the_keys_is_refused(
    golden: Callable[[str], Golden], place: int, caplog: pytest.LogCaptureFixture
) -> None:
    target = engine_of(golden("qwen3next-base").path)
    shape = target.engine.kv_store.cache.state_shape

    class Wrong:
        def acquire(self, keys: Sequence[bytes]) -> list[int]:
            return [0]

        def read(self, item: int) -> Sequence[Tensor]:
            return torch.tensor([place]), torch.zeros(shape)

        def release(self, items: list[int], num_kept: int) -> None:
            pass

    server = PeerServer(
        identity("attention-0"), TOKEN, host="127.0.0.1", what="kv-blocks", key_bytes=HASH_BYTES
    )
    server.start(Wrong())
    found = Fetching(target.engine, server.address, TIMEOUT_S)
    with closing(server), closing(found.fetches) as fetches:
        wanted = add(request_of("target", kv_peer="attention-0"))
        assert fetches.put(wanted)
        found.wait()
        assert fetches.take() == [wanted]
        assert failures(fetches) == 1
    assert f"has index {place} among {NUM_BLOCKS} keys" in caplog.text
    found.check_free()
    assert serve(target, request_of("target"))[0].num_cached_tokens == 0


def ahead(request: Request) -> PrefetchRequested:
    """A prefetch as its stream delivers it."""
    choices = range(request.n)
    return PrefetchRequested(
        "g", request, tuple(sequence_hashes(request, c, 16, None) for c in choices)
    )


def test_blocks_of_an_output_come_ahead_of_its_request(tiny_checkpoint: Path) -> None:
    source = engine_of(tiny_checkpoint)
    params = replace(request_of().params, max_tokens=40, temperature=1.0)
    whole = source.run([replace(request_of("r", n=2), params=params)])
    so_far = tuple(
        tuple(t for output in whole["r", choice] for t in output.token_ids)[:30]
        for choice in range(2)
    )
    moving = request_of("r", n=2, attempt=1, kv_peer="attention-0", output_so_far=so_far)
    moving = replace(moving, params=params)
    lender = KvBlockProvider(source.engine.kv_store, lambda: None)
    server = PeerServer(
        identity("attention-0"), TOKEN, host="127.0.0.1", what="kv-blocks", key_bytes=HASH_BYTES
    )
    server.start(lender)
    target = engine_of(tiny_checkpoint)
    found = Fetching(target.engine, server.address, TIMEOUT_S)
    with closing(server), closing(found.fetches) as fetches:
        fetches.prefetch(ahead(moving))
        for _ in range(2):  # a choice after the other: they share the blocks of the prompt
            assert fetches.take_prefetched() == []
            while not found.has_ended(0.01):
                lender.serve_requests()
            assert fetches.take() == []
        ((gateway, answer),) = fetches.take_prefetched()
        assert (gateway, answer.request_id, answer.attempt) == ("g", "r", 1)
        fetches.prefetch(ahead(moving))
        assert len(fetches.take_prefetched()) == 1, "all are here: nothing is to be fetched"
    found.check_free()
    moved = target.run([moving])
    for choice in range(2):
        rest = [t for output in moved["r", choice] for t in output.token_ids]
        assert (*so_far[choice], *rest) == tuple(
            t for output in whole["r", choice] for t in output.token_ids
        )
    num_blocks = (75 + 30 - 1) // 16
    assert target.engine.stats()["prefix_cache_hits_total"] == 2 * 16 * num_blocks


def test_a_prefetch_is_answered_when_its_peer_fails(tiny_checkpoint: Path, silent: Silent) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    request = request_of("r", kv_peer="attention-0", output_so_far=((1, 2),))
    with closing(found.fetches) as fetches:
        fetches.prefetch(ahead(request))
        silent.hang_up()
        found.wait()
        fetches.take()
        assert len(fetches.take_prefetched()) == 1
        fetches.prefetch(ahead(replace(request, kv_peer="attention-7")))
        assert len(fetches.take_prefetched()) == 1
    found.check_free()


def test_a_request_waits_for_blocks_that_come_ahead_of_it(
    tiny_checkpoint: Path, silent: Silent
) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    moving = request_of("r", kv_peer="attention-0", output_so_far=((1, 2),))
    come = add(replace(moving, attempt=1, kv_peer=""))
    with closing(found.fetches) as fetches:
        assert not fetches.has_prefetch(come.request)
        fetches.prefetch(ahead(moving))
        assert fetches.has_prefetch(come.request)
        assert fetches.put(come)
        assert fetches.names == ["r"]
        silent.hang_up()
        found.wait()
        assert fetches.take() == [come]
        assert fetches.take_prefetched() == [], "who has sent it need not know"
        assert fetches.names == []

        fetches.prefetch(ahead(moving))
        assert fetches.put(come)
        connection = silent.accept()  # the fetch has looked at the clock
        found.late_s = 2 * TIMEOUT_S
        assert fetches.take() == [come], "it has waited long enough"
        found.late_s = 0.0
        assert fetches.wait_s(60.0) == 60.0
        connection.close()
        found.wait()
        assert fetches.take() == []

        fetches.prefetch(ahead(moving))
        assert fetches.put(come)
        fetches.drop("r")
        silent.hang_up()
        found.wait()
        assert fetches.take() == []
        assert fetches.take_prefetched() == []
    found.check_free()


def test_an_attempt_does_not_wait_for_blocks_of_an_older_one(
    tiny_checkpoint: Path, silent: Silent
) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    moving = request_of("r", kv_peer="attention-0", output_so_far=((1, 2),))
    with closing(found.fetches) as fetches:
        fetches.prefetch(ahead(moving))
        assert not fetches.put(add(replace(moving, attempt=2, kv_peer="")))
        fetches.prefetch(ahead(replace(moving, kv_peer="attention-0")))
        found.is_peer_gone = True
        assert not fetches.put(add(replace(moving, attempt=1, kv_peer=""))), "nothing will come"
        silent.hang_up()
        found.wait()
        silent.hang_up()
        found.wait()
        assert fetches.take() == []
        assert fetches.take_prefetched() == []
    found.check_free()


def test_a_request_of_another_gateway_waits_on_when_the_one_that_asked_goes(
    tiny_checkpoint: Path, silent: Silent
) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    moving = request_of("r", kv_peer="attention-0", output_so_far=((1, 2),))
    come = dataclasses.replace(add(replace(moving, attempt=1, kv_peer="")), gateway="g2")
    with closing(found.fetches) as fetches:
        fetches.prefetch(ahead(moving))
        assert fetches.put(come)
        fetches.drop_gateway("g")
        silent.hang_up()
        found.wait()
        assert fetches.take() == [come]
    found.check_free()


def test_prefetches_wait_for_a_thread_and_can_be_dropped(
    tiny_checkpoint: Path, silent: Silent
) -> None:
    found = Fetching(engine_of(tiny_checkpoint).engine, silent.address, TIMEOUT_S)
    requests = [
        replace(command(f"r{seed}", seed).request, output_so_far=((1,),))
        for seed in range(MAX_FETCHING + 3)
    ]
    with closing(found.fetches) as fetches:
        for request in requests:
            fetches.prefetch(ahead(request))
        fetches.drop(requests[-1].request_id)
        for _ in range(MAX_FETCHING + 2):
            silent.hang_up()
            found.wait()
            fetches.take()
        names = [answer.request_id for _, answer in fetches.take_prefetched()]
        assert sorted(names) == sorted(r.request_id for r in requests[:-1])
        fetches.prefetch(ahead(requests[0]))
        fetches.drop_gateway("g")
        silent.hang_up()
        found.wait()
        fetches.take()
        assert fetches.take_prefetched() == []
    found.check_free()
