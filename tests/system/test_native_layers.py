"""Steps whose experts are on other workers, with all layers of the attention worker in one call."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from tests.harness.tiers import quick_values
from tests.reference.exact import exact, mixed_requests
from tests.reference.goldens import Golden
from tests.workers.native.builds import NAMES
from workers.dispatch.native_attention_side import NativeExchange
from workers.model.families.native_layers import NativeLayers, NativeMicroBatch
from workers.native.exchange import AttentionSideFields
from workers.transport import peer_connections

pytestmark = pytest.mark.skipif(not NAMES, reason="no compiled kernels on this machine")
VARIANTS = ["olmoe-norm-gqa-clip", "dots1-groups", "qwen3moe-dense-layers", "gptoss-base"]
LAYOUTS = [(1, 1), (2, 2)]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Native runs with experts elsewhere: whether they stopped before their end.

    Each micro-batch stops at an exchange: one between two layers would be late with its next rows.
    """
    found: Counter[bool] = Counter()
    run = NativeLayers.run

    def spy(
        layers: NativeLayers, flows: Sequence[NativeMicroBatch], *arguments: Any
    ) -> tuple[int, int]:
        stop, turn = run(layers, flows, *arguments)
        if flows[0].fields.exchanges:
            found[bool(stop)] += 1
            assert all(f.is_waiting or f.is_done or not f.num_begun for f in flows)
        return stop, turn

    monkeypatch.setattr(NativeLayers, "run", spy)
    return found


def check(of: Golden, layout: tuple[int, int], num_micro_batches: int) -> None:
    """A cluster gives what each request gives alone in one process, to the bit."""
    section = EngineSection(enable_prefix_caching=False)
    engine = LocalEngine(of.path, dtype="bfloat16", section=section)
    requests = mixed_requests(engine.config.vocab_size, count=9, max_tokens=10)
    expected = {}
    for request in requests:
        ((key, outputs),) = engine.run([request]).items()
        expected[key[0]] = exact(outputs)
    engine_section = {"num_micro_batches": num_micro_batches}
    config = make_config(of.path, *layout, dtype="bfloat16", engine=engine_section)
    with serving(ThreadCluster(config)) as cluster:
        answers = cluster.answers(requests)
        assert {name: exact(found.outputs) for name, found in answers.items()} == expected


@pytest.mark.parametrize(
    ("variant", "layout", "num_micro_batches"), quick_values(VARIANTS, LAYOUTS, [1, 2])
)
def test_answers_are_those_of_one_process(
    golden: Callable[[str], Golden],
    variant: str,
    layout: tuple[int, int],
    num_micro_batches: int,
    ends: Counter[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Native code stops in few steps, also where one expert rank is ahead of the other one."""
    monkeypatch.setattr(peer_connections, "LOOK_S", 30.0)  # a slow machine is no reason to stop
    check(golden(variant), layout, num_micro_batches)
    assert ends[False] > ends[True]


@pytest.mark.parametrize(
    ("variant", "layout", "num_micro_batches"), quick_values(VARIANTS, LAYOUTS, [1, 2])
)
def test_layers_go_on_where_native_code_has_stopped(
    golden: Callable[[str], Golden],
    variant: str,
    layout: tuple[int, int],
    num_micro_batches: int,
    ends: Counter[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not wait at all for the experts."""
    monkeypatch.setattr(peer_connections, "LOOK_S", 0.0)
    check(golden(variant), layout, num_micro_batches)
    assert ends[True] > 0


@pytest.mark.parametrize(("variant", "num_micro_batches"), quick_values(VARIANTS, [1, 2]))
def test_rows_that_were_not_sent_are_kept(
    golden: Callable[[str], Golden],
    variant: str,
    num_micro_batches: int,
    ends: Counter[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel takes nothing of a frame: Python sends what the rows were, whatever comes next."""
    here, there = socket.socketpair()
    here.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while here.send(bytes(1 << 16)):
            pass
    prepare, stopped, run = NativeExchange.prepare, NativeExchange.stopped, NativeLayers.run

    def spy_prepare(
        exchange: NativeExchange, *arguments: Any
    ) -> list[list[AttentionSideFields]] | None:
        exchanges = prepare(exchange, *arguments)
        for frame in exchange._direct.frames if exchanges and exchange._direct else ():
            frame.socket = here.fileno()
        return exchanges

    def spy_run(
        layers: NativeLayers, flows: Sequence[NativeMicroBatch], *arguments: Any
    ) -> tuple[int, int]:
        found = run(layers, flows, *arguments)
        for flow in flows:
            for _ in range(8):
                torch.full_like(flow.hidden, torch.nan)
        return found

    def spy_stopped(exchange: NativeExchange, result: int) -> None:
        assert exchange._direct is not None
        for frame, edge in zip(exchange._direct.frames, exchange._direct.edges, strict=True):
            frame.socket = edge.sock.fileno()
        stopped(exchange, result)

    monkeypatch.setattr(NativeExchange, "prepare", spy_prepare)
    monkeypatch.setattr(NativeExchange, "stopped", spy_stopped)
    monkeypatch.setattr(NativeLayers, "run", spy_run)
    with here, there:
        check(golden(variant), (1, 1), num_micro_batches)
    assert set(ends) == {True}
