"""What one seed means: the cluster's size, the requests of the clients, and the faults."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from tests.simulation.asks import REQUEST_LIMIT_S, Ask
from tests.simulation.features import FEATURES, with_chance, with_features
from tests.simulation.ray import Hosts
from tests.simulation.toy_model import NUM_EXPERTS, VOCAB

SPAN_S = 12.0
"""Time in which requests come and faults happen."""
_NODE_LIMITS_S = (4.0, 7.5, 65.0)
"""Ray's limits for a silent node: a short one, that of ``expertmesh node``, and Ray's own, which
outlasts every fault."""
KV_DISK_FAULT = "fail_kv_disk"
RACK_FAULTS = ("kill_half", "kill_domain", "isolate_domain")
NUM_RACKS = 2
_TOPICS = 4
"""What requests are about, one after the other."""
_BURST_S = 2.0
"""Time in which the requests of some seeds come."""
MIN_ATTENTION = 2
"""What a scenario has at least, like the next ones."""
MIN_EXPERTS = 3
MIN_GATEWAYS = 2
MIN_REQUESTS = 20
MIN_STEPS = 200
"""Committed steps."""
MIN_FAULTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that goes wrong."""

    at_s: float
    kind: str
    """Name of a method of ``faults.Faults``."""
    where: int = 0
    """Which worker, gateway or link: a number that the kind interprets."""
    other: int = 0
    lasts_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.at_s:.3f} s: {self.kind}({self.where}, {self.other}) {self.lasts_s:.2f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Everything of a seed but the order of events."""

    seed: int
    num_attention: int
    num_experts: int
    num_redundant: int
    moves_experts: bool
    """The cluster rebalances by itself."""
    autoscales: bool
    """The pools follow the load."""
    num_banks: int
    hosts: Hosts
    num_gateways: int
    num_kv_blocks: int
    slowness: float
    pool_delay_s: float
    """Longest time until a thread of a pool begins a piece of work, to load experts, say."""
    preemption: float
    asks: tuple[Ask, ...]
    num_steps: int
    """Committed steps for which a client asks on, one request at a time, when ``asks`` are over."""
    asks_on_at_s: float
    """Not before."""
    faults: tuple[Fault, ...]
    node_limit_s: float
    """Silence after which a node is dead to Ray."""
    may_move: bool
    """The room of a dead node is found again on other hosts; else it is waited for."""
    features: frozenset[str]
    """Names of ``FEATURES`` that its requests and its cluster use."""
    num_racks: int = 0
    """Racks between which the hosts are divided, each a failure domain; 0: hosts have no label."""

    @property
    def keeps_on_disk(self) -> bool:
        """Workers keep KV blocks on disk, behind host memory."""
        return "tiers_on_disk" in self.features


def draw_scenario(
    seed: int,
    kinds: tuple[str, ...],
    features: tuple[str, ...] | None = None,
    needed: tuple[str, ...] = (),
) -> Scenario:
    """The scenario of a seed, with faults of the ``kinds``, and with these features; None: about
    half of them, and all that are ``needed``.
    """
    rng = random.Random(f"scenario {seed}")
    chosen = _draw_features(seed) if features is None else frozenset(features)
    chosen |= frozenset(needed)
    num_gateways = rng.choice((MIN_GATEWAYS, MIN_GATEWAYS, 3))
    num_redundant = rng.choice((0, 1, 3))
    return Scenario(
        seed=seed,
        num_attention=rng.choice((*3 * [MIN_ATTENTION], 3)),
        num_experts=rng.choice((*3 * [MIN_EXPERTS], 4)),
        num_redundant=num_redundant,
        moves_experts=num_redundant > 0 and rng.random() < 0.5,
        autoscales=_draw_autoscales(seed, kinds),
        num_banks=rng.choice((1, 1, 1, 2)),
        hosts=rng.choice(tuple(Hosts)),
        num_gateways=num_gateways,
        num_kv_blocks=rng.choice((24, 64, 256)),
        slowness=rng.choice((1.0, 2.0, 4.0)),
        preemption=rng.choice((0.0, 0.01, 0.05)),
        asks=with_features(_draw_asks(rng, num_gateways), chosen),
        num_steps=MIN_STEPS,
        asks_on_at_s=rng.uniform(0, SPAN_S),
        faults=tuple(_draw_all_faults(rng, seed, kinds, chosen)),
        pool_delay_s=rng.choice((0.0, 0.0, 0.3)),
        node_limit_s=rng.choice(_NODE_LIMITS_S) * rng.uniform(0.8, 1.2),
        may_move=rng.random() < 0.5,
        features=chosen,
    )


def enlarged(scenario: Scenario, num_attention: int, num_experts: int) -> Scenario:
    """Return the scenario with other numbers of workers. If it has faults of racks, it gets two
    racks, and slots for two copies of each expert.
    """
    scenario = replace(scenario, num_attention=num_attention, num_experts=num_experts)
    if not any(fault.kind in RACK_FAULTS for fault in scenario.faults):
        return scenario
    of_a_rack = math.ceil(NUM_EXPERTS / (num_experts // NUM_RACKS))
    return replace(
        scenario,
        num_racks=NUM_RACKS,
        num_redundant=of_a_rack - math.ceil(NUM_EXPERTS / num_experts),
        hosts=Hosts.MIXED if scenario.hosts is Hosts.ONE else scenario.hosts,
    )


def _draw_features(seed: int) -> frozenset[str]:
    rng = random.Random(f"features {seed}")
    found = frozenset(name for name in FEATURES if rng.random() < 0.5)
    return found if "tiers" in found else found - {"tiers_on_disk"}


def _draw_autoscales(seed: int, kinds: tuple[str, ...]) -> bool:
    """In a quarter of the scenarios that may scale, drawn apart from all else."""
    return "scale" in kinds and random.Random(f"autoscale {seed}").random() < 0.25


def _draw_asks(rng: random.Random, num_gateways: int) -> tuple[Ask, ...]:
    first = rng.uniform(0, SPAN_S - _BURST_S)
    begin, end = rng.choice((*3 * [(0.0, SPAN_S)], (first, first + _BURST_S)))
    stems = _draw_stems(rng)
    return tuple(
        _draw_ask(rng, f"r{i}", rng.randrange(num_gateways), rng.uniform(begin, end), stems)
        for i in range(rng.randint(MIN_REQUESTS, 26))
    )


def draw_more(scenario: Scenario) -> Iterator[Ask]:
    """Requests of the client that asks on."""
    rng = random.Random(f"more {scenario.seed}")
    stems = _draw_stems(rng)
    for i in itertools.count():
        ask = _draw_ask(rng, f"more-{i}", rng.randrange(scenario.num_gateways), 0.0, stems)
        yield with_chance(ask, scenario.features)


def _draw_stems(rng: random.Random) -> list[list[int]]:
    """Beginnings that prompts share."""
    return [_draw_tokens(rng, topic, 24) for topic in range(_TOPICS)]


def _draw_ask(
    rng: random.Random, name: str, gateway: int, at_s: float, stems: list[list[int]]
) -> Ask:
    topic = int(_TOPICS * at_s / SPAN_S) if rng.random() < 0.8 else rng.randrange(_TOPICS)
    stem = stems[topic][: rng.choice((0, 7, 14, 22))]
    return Ask(
        name=name,
        gateway=gateway,
        at_s=at_s,
        prompt=(*stem, *_draw_tokens(rng, topic, rng.randint(1, 12))),
        max_tokens=rng.randint(8, 28),
        seed=rng.getrandbits(32),
        cache_salt=rng.choice(("", "", "tenant", "another")),
        abort_after=rng.randint(1, 8) if rng.random() < 0.1 else None,
        limit_s=rng.choice((0.3, 1.0, 3.0)) if rng.random() < 0.1 else REQUEST_LIMIT_S,
    )


def _draw_tokens(rng: random.Random, topic: int, count: int) -> list[int]:
    """Tokens of a topic, which belong to a few experts: the load changes with the topics."""
    size = VOCAB // _TOPICS
    return [topic * size + rng.randrange(size) for _ in range(count)]


def _draw_all_faults(
    rng: random.Random, seed: int, kinds: tuple[str, ...], features: Set[str]
) -> list[Fault]:
    """Those of the workers' disks, in scenarios that have some, are drawn apart from all else."""
    found = _draw_faults(rng, tuple(kind for kind in kinds if kind != KV_DISK_FAULT))
    if KV_DISK_FAULT in kinds and "tiers_on_disk" in features:
        found += _draw_faults(random.Random(f"disks {seed}"), (KV_DISK_FAULT,))
    return sorted(found, key=lambda fault: fault.at_s)


def _draw_faults(rng: random.Random, kinds: tuple[str, ...]) -> list[Fault]:
    count = rng.choice((MIN_FAULTS, MIN_FAULTS, 4, 5))
    if not kinds:
        return []
    found = [
        Fault(
            at_s=rng.uniform(0.2, SPAN_S),
            kind=rng.choice(kinds),
            where=rng.randrange(1000),
            other=rng.randrange(1000),
            lasts_s=rng.choice((0.05, 0.5, 1.5, 3.0, 8.0)) * rng.uniform(0.5, 1.5),
        )
        for _ in range(count)
    ]
    if rng.random() < 0.5:  # faults that come together find more
        first = found[0].at_s
        found = [
            Fault(
                at_s=first + rng.expovariate(1 / 0.5),
                kind=f.kind,
                where=f.where,
                other=f.other,
                lasts_s=f.lasts_s,
            )
            for f in found
        ]
    return sorted(found, key=lambda fault: fault.at_s)
