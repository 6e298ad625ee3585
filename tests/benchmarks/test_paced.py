"""Expert banks that wait instead of computing."""

from __future__ import annotations

import pickle

import pytest
import torch
from ray import cloudpickle

from benchmarks.placement.paced import ComputeTime, PacedBank, paced_worker
from cluster.config.cluster import ClusterConfig
from cluster.core.topology import Member
from workers.experts.slots import ExpertSlots
from workers.model.config import BankSpec, ExchangeSpec
from workers.process.worker.actor import ExpertWorker
from workers.process.worker_args import WorkerArgs

SPEC = BankSpec(
    index=0,
    bank="mlp",
    layer=0,
    num_experts=8,
    top_k=2,
    exchanges=(ExchangeSpec(index=0, name="mlp", in_width=4, out_width=6, expert_width=2),),
)


class SlowClock:
    """Time passes in sleeps, a little more than asked for."""

    def __init__(self, too_long: float = 0.0) -> None:
        self.now = 50.0
        self.slept: list[float] = []
        self._too_long = too_long

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self._too_long


def run(bank: PacedBank, *slots: int) -> torch.Tensor:
    pairs = torch.arange(len(slots))
    return bank.compute(0, torch.ones(len(slots), 4), pairs, torch.tensor(slots))


def test_a_step_takes_its_slots_and_its_pairs() -> None:
    clock = SlowClock()
    bank = PacedBank(SPEC, ComputeTime(slot_s=0.5, token_s=0.25), clock.read, clock.sleep)
    output = run(bank, 3, 3, 1, 3)
    assert clock.slept == pytest.approx([2 * 0.5 + 4 * 0.25])
    assert output.shape == (4, 6)
    assert not output.any()


def test_what_was_overslept_is_taken_off_the_next_wait() -> None:
    clock = SlowClock(too_long=0.125)
    bank = PacedBank(SPEC, ComputeTime(slot_s=1.0, token_s=0.0), clock.read, clock.sleep)
    for _ in range(4):
        run(bank, 2)
    assert clock.slept == pytest.approx([1.0, 0.875, 0.875, 0.875])
    assert clock.now == pytest.approx(54.125)


def test_an_actor_class_takes_its_times_to_another_process() -> None:
    time_taken = ComputeTime(slot_s=0.5, token_s=0.25)
    data: bytes = cloudpickle.dumps(paced_worker(time_taken))  # type: ignore[no-untyped-call]
    sent: type[ExpertWorker] = pickle.loads(data)
    args = WorkerArgs(
        config=ClusterConfig.from_dict({"model": {"path": "p", "served_model_name": "m"}}),
        member=Member(name="expert-0", role="expert", rank=0, device=0),
        control_address="127.0.0.1:1",
        host="127.0.0.1",
    )
    worker = sent._make_worker(sent.__new__(sent), args, lambda reason: None)
    worker.control.close()
    assert worker.banks_of is not None
    made = worker.banks_of(ExpertSlots([SPEC], 2, torch.float32, torch.device("cpu")))
    assert [bank.time_taken for bank in made if isinstance(bank, PacedBank)] == [time_taken]
