"""Expert load counted from the routes of committed steps."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks.harness.mesh import make_bank
from cluster.core.load_report import Counts
from tests.harness.pretend_gpu import DEVICE, pretend_gpu
from workers.dispatch.copies import ChosenCopies
from workers.engine.expert_load import LoadCounter, RoutedDecodes, RoutedRows
from workers.model.side_stream import SideStream

BANKS = (make_bank(0), make_bank(1))
NUM_EXPERTS = BANKS[0].num_experts
KEY = (BANKS[0].bank, BANKS[0].layer)


def decodes(*rows: Sequence[int]) -> RoutedRows:
    return RoutedRows(torch.tensor(rows), None, len(rows))


def prompts(rows: Sequence[Sequence[int]], copies: Sequence[Sequence[int]] | None) -> RoutedRows:
    return RoutedRows(torch.tensor(rows), None if copies is None else chosen(copies), 0)


def chosen(copies: Sequence[Sequence[int]]) -> ChosenCopies:
    return ChosenCopies(torch.tensor(copies), 1 + max(map(max, copies)))


def step(*parts: RoutedRows) -> list[list[RoutedRows]]:
    """The same micro-batches in every bank."""
    return [list(parts) for _ in BANKS]


def counted(counts: Counts) -> dict[int, int]:
    return {expert: int(count) for expert, count in enumerate(counts) if count}


def test_tokens_are_counted_by_expert_and_phase() -> None:
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    copies = ChosenCopies(torch.tensor([[9, 9], [0, 1], [1, 0]]), 2)
    mixed = RoutedRows(torch.tensor([[0, 1], [2, 3], [0, 3]]), copies, 1)
    load.add(1, 3, step(mixed))
    load.add(1, 1, step(decodes([3, 0])))
    report = load.report()
    assert report.rows == 4
    assert list(report.banks) == [(b.bank, b.layer) for b in BANKS]
    for counts in report.banks.values():
        assert counted(counts.decode) == {0: 2, 1: 1, 3: 1}
        assert counted(counts.prefill) == {0: 1, 2: 1, 3: 2}
        assert counts.epoch_prefill.shape == (NUM_EXPERTS, 2)
        assert counts.epoch_prefill[[0, 2, 3]].tolist() == [[0, 1], [1, 0], [1, 1]]
        assert (counts.epoch_decode == counts.decode).all()


def test_a_prompt_without_a_choice_takes_the_first_copy() -> None:
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    load.add(1, 1, step(prompts([[1, 2]], None)))
    load.add(1, 1, step(prompts([[1, 2]], [[1, 0]])))
    assert load.report().banks[KEY].epoch_prefill[[1, 2]].tolist() == [[1, 1], [2, 0]]


def test_a_new_epoch_counts_copies_afresh() -> None:
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    load.add(1, 1, step(prompts([[0, 1]], [[1, 0]])))
    load.add(2, 2, step(prompts([[0, 1]], None), decodes([2, 3])))
    report = load.report()
    counts = report.banks[KEY]
    assert (report.epoch, report.rows) == (2, 3)
    assert counted(counts.prefill) == {0: 2, 1: 2}
    assert counts.epoch_prefill.shape == (NUM_EXPERTS, 1)
    assert counted(counts.epoch_prefill[:, 0]) == {0: 1, 1: 1}
    assert counted(counts.epoch_decode) == {2: 1, 3: 1}


def test_what_a_report_was_given_does_not_change() -> None:
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    load.add(1, 1, step(decodes([0, 1])))
    before = load.report()
    load.add(1, 1, step(decodes([0, 1])))
    load.flush()
    assert counted(before.banks[KEY].decode) == {0: 1, 1: 1}
    assert counted(load.report().banks[KEY].decode) == {0: 2, 1: 2}


def test_many_steps_are_not_kept_until_somebody_asks() -> None:
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    seen: list[weakref.ref[torch.Tensor]] = []

    def add(num_rows: int) -> int:
        """Count one step; the number of steps that are kept."""
        routed = decodes([0, 1])
        seen.append(weakref.ref(routed.topk_ids))
        load.add(1, num_rows, step(routed))
        del routed
        return sum(kept() is not None for kept in seen)

    assert max(add(1) for _ in range(1000)) < 300
    load.flush()
    assert max(add(3000) for _ in range(10)) <= 1
    assert counted(load.report().banks[KEY].decode) == {0: 1010, 1: 1010}


def test_reports_beside_a_running_engine_lose_nothing() -> None:
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    seen: list[int] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.append(int(load.report().banks[KEY].decode.sum()))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(3000):
        load.add(1, 1, step(decodes([0, 1])))
    ended.set()
    reader.join()
    assert seen == sorted(seen)
    report = load.report()
    assert report.rows == 3000
    assert counted(report.banks[KEY].decode) == {0: 3000, 1: 3000}


def test_a_gpu_counts_many_steps_with_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.expert_load._MAX_ROWS", 20)
    expected = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    parts = [prompts([[0, 1], [2, 3]], [[1, 0], [0, 2]]), decodes([3, 0]), prompts([[1, 2]], None)]
    with pretend_gpu() as log:
        load = LoadCounter(BANKS, SideStream(torch.device(DEVICE)))
        there = [on_device(part) for part in parts]
        log.clear()
        for _ in range(9):
            load.add(1, 4, step(*there))
            expected.add(1, 4, step(*parts))
        assert sum(log.waits.values()) == 1  # of five steps
        found = load.report()
        assert sum(log.waits.values()) == 2
    for key, counts in expected.report().banks.items():
        for name in ("prefill", "decode", "epoch_prefill", "epoch_decode"):
            assert (getattr(found.banks[key], name) == getattr(counts, name)).all()


def test_decodes_of_a_captured_step_count_by_bank() -> None:
    rows = torch.tensor([[0, 1], [2, 3], [1, 3]])
    banks = RoutedDecodes(torch.cat([rows.t(), 3 - rows.t()]), (2, 4))
    assert [len(bank) for bank in banks] == [1, 1]
    load, expected = (LoadCounter(BANKS, SideStream(torch.device("cpu"))) for _ in range(2))
    load.add(1, 3, banks)
    parts = [[RoutedRows(own, None, 3)] for own in (rows, 3 - rows)]
    expected.add(1, 3, parts)
    assert [bank[0].topk_ids.tolist() for bank in banks[:]] == [
        bank[0].topk_ids.tolist() for bank in parts
    ]
    for key, counts in expected.report().banks.items():
        assert (load.report().banks[key].decode == counts.decode).all()


def test_rows_of_sequences_that_have_ended_do_not_count() -> None:
    rows = torch.tensor([[0, 1], [2, 3], [1, 3]])
    load = LoadCounter(BANKS, SideStream(torch.device("cpu")))
    load.add(1, 2, RoutedDecodes(torch.cat([rows.t(), 3 - rows.t()]), (2, 4), (0, 2)))
    banks = list(load.report().banks.values())
    assert [counted(bank.decode) for bank in banks] == [{0: 1, 1: 2, 3: 1}, {0: 1, 2: 2, 3: 1}]


def on_device(part: RoutedRows) -> RoutedRows:
    copies = part.copies
    if copies is not None:
        copies = copies._replace(places=copies.places.to(DEVICE))
    return replace(part, topk_ids=part.topk_ids.to(DEVICE), copies=copies)
