"""Waiting sequences in turn, without a walk over all of them."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from tests.workers.scheduling.test_fairness import ask
from tests.workers.scheduling.test_scheduler import Desk
from workers.requests.sequence import SequenceState
from workers.scheduling.fairness import ServedTokens
from workers.scheduling.waiting_turns import WaitingTurns


class Line:
    """Waiting sequences and their turns, with those that left."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._desk = Desk()
        self.served = ServedTokens()
        self.turns = WaitingTurns(self.served)
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []

    def arrive(self, tenant: str) -> None:
        rng = self._rng
        weight, priority = 1.0 + (hash_of(tenant) % 3), rng.choice([0, 0, 1, -2])
        sequence = ask(self._desk, tenant, rng.randint(1, 9), weight=weight, priority=priority)
        self.served.add(sequence)
        self.turns.add(sequence)
        self.waiting.append(sequence)

    def leave(self) -> None:
        sequence = self.waiting.pop(self._rng.randrange(len(self.waiting)))
        self.turns.remove(sequence)
        if self._rng.random() < 0.5:
            self.running.append(sequence)
        else:
            self.served.remove(sequence)

    def in_turn(self) -> list[SequenceState]:
        ordered = sorted(self.waiting, key=lambda s: s.order)
        return list(self.served.in_turn(ordered))


def hash_of(tenant: str) -> int:
    return sum(tenant.encode())


@pytest.mark.parametrize("seed", range(8))
def test_turns_are_those_of_a_sort_of_all(seed: int) -> None:
    rng = random.Random(seed)
    line = Line(rng)
    tenants = [f"t{i}" for i in range(rng.choice([1, 2, 20]))]
    for _ in range(300):
        event = rng.random()
        if event < 0.5 or not line.waiting:
            line.arrive(rng.choice(tenants))
        elif event < 0.8:
            line.leave()
        elif line.running:
            one = rng.choice(line.running)
            line.served.charge(one, rng.randint(1, 30))
            if event > 0.95:
                line.running.remove(one)
                line.served.remove(one)
        assert list(line.turns) == line.in_turn()


class CountedTokens(ServedTokens):
    """Counts how often it is asked for a tenant."""

    num_asked = 0

    def of(self, tenant: str) -> float:
        self.num_asked += 1
        return super().of(tenant)


def num_asked(num_tenants: int) -> int:
    """How many tenants are looked at for the first four in turn, after all were charged."""
    desk, served = Desk(), CountedTokens()
    turns = WaitingTurns(served)
    for number in range(num_tenants):
        sequence = ask(desk, f"t{number}")
        served.add(sequence)
        turns.add(sequence)
        if number >= 4:
            served.charge(sequence, 100)
    assert len(list(turns)) == num_tenants
    served.num_asked = 0
    first = turns.__iter__()
    assert [next(first).request.tenant for _ in range(4)] == ["t0", "t1", "t2", "t3"]
    return served.num_asked


def test_the_first_in_turn_cost_the_same_with_many_tenants() -> None:
    assert num_asked(10) == num_asked(400) <= 6


def test_turns_of_a_tenant_that_comes_and_goes_are_forgotten() -> None:
    desk, served = Desk(), ServedTokens()
    turns = WaitingTurns(served)
    for tenant in ("a", "b"):
        sequence = ask(desk, tenant)
        served.add(sequence)
        turns.add(sequence)
    for _ in range(100):
        plain = ask(desk, "c")
        other = SequenceState(replace(plain.request, priority=-1), 0, plain.arrival, plain.deadline)
        for one in (plain, other):
            served.add(one)
            turns.add(one)
        assert next(iter(turns)) is not plain
        for one in (plain, other):
            turns.remove(one)
            served.remove(one)
    assert len(turns._heap) < 12
