"""``plan simulate`` beside real clusters: ``python -m benchmarks.simulated.serving [--json]``.

Real clusters serve random requests through a real gateway, and the simulation predicts the same
requests: equal arrivals, lengths and limits. On a laptop all workers share the same cores, so each
worker is paced: it takes the time that the roofline gives a slow device for the rows that it has in
fact, and waits if it computes them faster. The work of the hosts and their messages is measured
before each run, in steps with one row and in steps with many: it is the time beyond the paces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from benchmarks.serving.throughput import TINY, random_model
from cluster.cli.terminal.arguments import count, positive
from cluster.cli.terminal.output import table
from cluster.config.cluster import EngineSection
from cluster.launch.checkpoint_check import CheckpointCheck
from cluster.simulation.serving import ServingSimulation
from cluster.simulation.step_group import work_of
from cluster.sizing.group_steps import GroupSizes, GroupSteps
from cluster.sizing.mixed_step import PoolSizes, RankRows, StepTimes
from cluster.sizing.roofline import DeviceSpec, HostTime, ModelSize, StepTime, activation_shares
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import CompletedRequest, Tally
from gateway.core.call import CallKind, GenerateCall
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.model_runner import ModelRunner
from workers.process.roles.experts import ExpertRole

LAYOUTS = ("1+1", "1+2", "2+3", "2+1+2")
"""Attention and expert workers; or prefill, decode and expert workers."""
MODEL = replace(TINY, experts=16, top_k=4)
ENGINE: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 128,
    "kv_cache_bytes": 64 << 20,
    "enable_prefix_caching": False,
}
DEVICE = DeviceSpec(
    name="paced device",
    bandwidth_bytes_s=24e6,
    flops_s=260e6,
    link_bytes_s=1e12,
    latency_s=0.0,
    message_s=0.0,
)
"""So slow that a step of decodes takes some tens of milliseconds with the small model."""
_PROMPT_LEN, _HOST_ROWS = 8, 8
_HOST_TOKENS = 40
_NUM_FIRST = 15
RATES = (1.0, 2.0, 3.0, 4.0)
"""Requests per second."""
MEASURES = ("tokens_per_s", "ttft_ms", "itl_ms")
"""Compared fields of ``Served``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What clients measured, or would measure."""

    tokens_per_s: float
    """Output tokens from the first arrival to the last token."""
    ttft_ms: float
    """Mean time to the first token."""
    itl_ms: float
    """Mean time between tokens."""

    @classmethod
    def of(cls, tally: Tally, seconds: float) -> Served:
        found = tally.results(seconds)
        return cls(
            tokens_per_s=found["output_tokens_per_s"],
            ttft_ms=found["ttft_ms"]["mean"],
            itl_ms=found["itl_ms"]["mean"],
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A real cluster and its prediction under one arrival rate."""

    layout: str
    rate_per_s: float
    hosts: tuple[HostTime, ...]
    """Of the last run; if one attention worker has rows, if two have, and so on."""
    real: Served
    predicted: Served

    def columns(self) -> list[str]:
        """Return real value, prediction and their ratio of each measure."""
        pairs = ((getattr(self.real, name), getattr(self.predicted, name)) for name in MEASURES)
        return [f"{real:.4g}, {said:.4g}, {said / real:.2f}" for real, said in pairs]


def make_arrivals(number: int, rate_per_s: float, seed: int) -> list[Arrival]:
    """Return Poisson arrivals of prompts of 16 to 160 tokens and outputs of 8 to 48."""
    draw = random.Random(seed)
    due_s, found = 0.0, []
    for _ in range(number):
        found.append(Arrival(due_s, draw.randint(16, 160), draw.randint(8, 48)))
        due_s += draw.expovariate(rate_per_s)
    return found


@dataclass(slots=True)
class Pace:
    """Times that the paced workers take."""

    device: DeviceSpec
    model: ModelSize
    times: StepTimes

    @classmethod
    def of(cls, device: DeviceSpec, model: ModelSize, pools: PoolSizes) -> Pace:
        return cls(device, model, StepTimes(model, pools, device))

    def expert_s(self, bank: int, num_slots: int, num_pairs: int) -> float:
        """Return the seconds of ``num_pairs`` pairs in ``num_slots`` slots of a bank."""
        size = self.model.banks[bank]
        read_s = num_slots * self.device.read_s(size.memory_bytes(self.model.itemsize))
        return max(read_s, self.device.compute_s(2.0 * num_pairs * size.expert_values))


class SharedCores(StepTimes):
    """Times of steps if all workers share the cores, so that the hosts of each slow the others."""

    def __init__(
        self, model: ModelSize, pools: PoolSizes, device: DeviceSpec, hosts: Sequence[HostTime]
    ) -> None:
        """``hosts``: times if one attention worker has rows, if two have, and so on."""
        super().__init__(model, pools, device)
        self._each = [StepTimes(model, pools, replace(device, host=host)) for host in hosts]

    def step(self, ranks: Sequence[RankRows], **options: Any) -> StepTime:
        """Return the time of a step with the hosts' time for as many workers."""
        return self._each[len(ranks) - 1].step(ranks, **options)


class PacedCluster:
    """A real cluster with a gateway, and paces for its workers."""

    def __init__(self, cluster: ThreadCluster, gateway: ClusterGateway, pace: Pace) -> None:
        self._cluster = cluster
        self._gateway = gateway
        self._pace = pace
        self._num_served = 0
        for rank in range(self._num_ranks):
            _pace_attention(cluster.group.attention(f"attention-{rank}").engine.runner, pace)
        for role in self._experts():
            _pace_experts(role, pace)

    def measure_hosts(self, num_workers: int) -> tuple[tuple[HostTime, ...], float]:
        """Measure how much longer steps take than their paces: with a row on one worker, on two and
        so on up to ``num_workers``, and with many rows on each.

        Returns also the seconds from a client to a worker and back, outside of steps.
        """
        ones_s = [self._host_s(1, number) for number in range(1, num_workers + 1)]
        many_s = self._host_s(_HOST_ROWS, num_workers)
        row_s = max(0.0, many_s - ones_s[-1]) / (_HOST_ROWS - 1)
        first_s = statistics.median(self._first_s(number) for number in range(_NUM_FIRST))
        prompt = RankRows(num_rows=_PROMPT_LEN, num_drawn=1, context_tokens=_PROMPT_LEN)
        step_s = self._pace.times.step([prompt], has_prefill=True).step_s + ones_s[0]
        hosts = (HostTime(step_s=one_s - row_s, row_s=row_s) for one_s in ones_s)
        return tuple(hosts), max(first_s - step_s, 0.0)

    def choices(self) -> list[list[float]]:
        """Return how often rows have chosen each expert, by bank."""
        counts = [role.servers[0].counters.token_counts for role in self._experts()]
        return [torch.cat(parts).tolist() for parts in zip(*counts, strict=True)]

    def serve(self, arrivals: Sequence[Arrival], name: str) -> Served:
        """Serve requests at their times."""
        return self._gateway.run(self._serve(arrivals, name))

    @property
    def _num_ranks(self) -> int:
        return self._cluster.config.workers.num_attention_ranks

    def _experts(self) -> Iterator[ExpertRole]:
        for rank in range(self._cluster.config.workers.num_expert_workers):
            role = self._cluster.group.workers[f"expert-{rank}"].roles.experts
            assert role is not None
            yield role

    async def _serve(self, arrivals: Sequence[Arrival], name: str) -> Served:
        clock, tally = time.monotonic, Tally({})
        start, first = clock() + 0.05, self._num_served  # no prompt comes twice
        self._num_served += len(arrivals)

        async def serve_one(number: int, arrival: Arrival) -> None:
            await asyncio.sleep(start + arrival.due_s - clock())
            began = clock()
            tally.begin(began - start - arrival.due_s)
            call = make_call(arrival, first + number)
            answer = await self._gateway.serve(call, f"{name}-{number}")
            pieces = [at - began for at in answer.times]
            lengths = arrival.input_len, answer.num_tokens
            tally.take(CompletedRequest(pieces, pieces[-1], *lengths))

        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(arrivals):
                group.create_task(serve_one(number, arrival))
        return Served.of(tally, clock() - start)

    def _host_s(self, num_rows: int, num_workers: int) -> float:
        """Return the median time between tokens of ``num_rows`` requests on each of some workers,
        among which the gateway divides them, without the paces."""
        arrival = Arrival(0.0, _PROMPT_LEN, _HOST_TOKENS)
        calls = [make_call(arrival, number) for number in range(num_rows * num_workers)]
        gaps = [
            after - before
            for answer in self._gateway.answer(calls)
            for before, after in pairwise(answer.times)
        ]
        context = num_rows * (_PROMPT_LEN + _HOST_TOKENS // 2)
        rows = RankRows(num_rows=num_rows, num_drawn=num_rows, context_tokens=context)
        paced = self._pace.times.step([rows] * num_workers, has_prefill=False)
        return max(0.0, statistics.median(gaps) - paced.step_s)

    def _first_s(self, number: int) -> float:
        """Return the time to the first token of a request without others."""
        began = time.monotonic()
        (answer,) = self._gateway.answer([make_call(Arrival(0.0, _PROMPT_LEN, 1), number)])
        return answer.times[0] - began


def make_call(arrival: Arrival, number: int) -> GenerateCall:
    """Return the call of a completion; ``number`` selects the prompt."""
    return GenerateCall(
        kind=CallKind.COMPLETION,
        prompts=(tuple(arrival.prompt(1000, f"prompt {number}")),),
        max_tokens=arrival.output_len,
        ignore_eos=True,
        token_ids_only=True,
        temperature=1.0,
        seed=number,
    )


def _pace_attention(runner: ModelRunner, pace: Pace) -> None:
    run: Callable[..., Any] = runner.run

    @wraps(run)
    def paced(header: Any, plan: Any, **more: Any) -> Any:
        runner.on_compute()  # else outputs would wait for the pace
        time.sleep(pace.times.attention_s(work_of(plan), pace.model))
        return run(header, plan, **more)

    runner.run = paced  # type: ignore[method-assign]


def _pace_experts(role: ExpertRole, pace: Pace) -> None:
    """Serve exchanges by Python, as native code has no place for a pace, and pace them."""
    for server in role.servers:
        server._native.begin_step = server._static.begin_step  # type: ignore[method-assign]
        server._native.serve = server._static.serve  # type: ignore[method-assign]
    for bank in role.slots.banks:
        rows, pairs = bank.compute_rows, bank.compute
        paced = _paced(rows, pace, bank.spec.index, lambda args: args[2])
        bank.compute_rows = paced  # type: ignore[method-assign]
        paced = _paced(pairs, pace, bank.spec.index, lambda args: args[3])
        bank.compute = paced  # type: ignore[method-assign]


def _paced(
    compute: Callable[..., Any], pace: Pace, bank: int, slots_of: Callable[[Any], torch.Tensor]
) -> Callable[..., Any]:
    @wraps(compute)
    def paced(*args: Any) -> Any:
        began = time.monotonic()
        outputs = compute(*args)
        here = [slot for slot in slots_of(args).flatten().tolist() if slot >= 0]
        busy_s = pace.expert_s(bank, len(set(here)), len(here))
        time.sleep(max(0.0, began + busy_s - time.monotonic()))
        return outputs

    return paced


def simulated(
    times: StepTimes,
    pools: PoolSizes,
    arrivals: Sequence[Arrival],
    kv_bytes_per_token: int,
    entry_s: float,
    groups: GroupSteps | None = None,
) -> Served:
    """Predict what the clients measure."""
    engine = EngineSection(**ENGINE)
    simulation = ServingSimulation(
        times,
        engine,
        num_attention=pools.num_attention,
        num_kv_blocks=engine.num_kv_blocks(kv_bytes_per_token, MODEL.max_positions),
        max_model_len=MODEL.max_positions,
        micro_batches=MicroBatchRule(),
        entry_s=entry_s,
        groups=groups,
    )
    tally = Tally({})
    simulation.run(arrivals, tally, lambda: None)
    return Served.of(tally, simulation.now_s)


def measure(
    checkpoint: Path,
    pools: PoolSizes,
    num_prefill: int,
    rates: Sequence[float],
    number: int,
    repeats: int,
) -> Iterator[Comparison]:
    """Yield each rate's median of the repeats, real and predicted.

    ``num_prefill``: attention workers of a prefill group; 0 without step groups.
    """
    facts = CheckpointCheck(checkpoint, os.environ).result()
    engine, workers, num_decode = ENGINE, {}, pools.num_attention - num_prefill
    if num_prefill:
        engine = ENGINE | {"enable_prefix_caching": True}
        workers = {
            "num_attention_workers": None,
            "num_prefill_workers": num_prefill,
            "num_decode_workers": num_decode,
        }
    sizes = GroupSizes(num_prefill, num_decode, pools.num_experts)
    text = sizes.text if num_prefill else pools.text
    cluster = ThreadCluster(
        make_config(
            checkpoint, pools.num_attention, pools.num_experts, engine=engine, workers=workers
        )
    )
    with serving(cluster), gateway_of(cluster) as gateway:
        model = facts.size("auto", None)
        pace = Pace.of(replace(DEVICE, bandwidth_bytes_s=1e15, flops_s=1e18), model, pools)
        paced = PacedCluster(cluster, gateway, pace)
        paced.serve(make_arrivals(_NUM_FIRST, 100.0, 99), "warm-up")
        chosen = zip(model.banks, paced.choices(), strict=True)
        banks = (replace(b, activation=activation_shares(n, b.top_k)) for b, n in chosen)
        pace.model = model = replace(model, banks=tuple(banks))
        pace.device, pace.times = DEVICE, StepTimes(model, pools, DEVICE)
        for rate in rates:
            real, predicted = [], []
            for repeat in range(repeats):
                arrivals = make_arrivals(number, rate, repeat)
                hosts, entry_s = paced.measure_hosts(1 if num_prefill else pools.num_attention)
                real.append(paced.serve(arrivals, f"{rate}-{repeat}"))
                times = SharedCores(model, pools, DEVICE, hosts)
                kv_bytes, groups = facts.kv_bytes_per_token("auto"), None
                if num_prefill:
                    groups = GroupSteps(model, sizes, replace(DEVICE, host=hosts[0]))
                predicted.append(simulated(times, pools, arrivals, kv_bytes, entry_s, groups))
            yield Comparison(text, rate, hosts, _median(real), _median(predicted))


def _median(runs: Sequence[Served]) -> Served:
    by_name = {name: [getattr(run, name) for run in runs] for name in MEASURES}
    return Served(**{name: statistics.median(values) for name, values in by_name.items()})


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated.serving")
    parser.add_argument("--rates", type=positive, nargs="+", default=RATES, metavar="REQUESTS/S")
    default = [*map(_layout, LAYOUTS)]
    parser.add_argument("--layouts", nargs="+", default=default, metavar="A+E", type=_layout)
    parser.add_argument("--requests", type=count, default=60, metavar="N", help="of a run (60)")
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="of a rate (5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def _layout(text: str) -> tuple[int, ...]:
    numbers = tuple(map(count, text.split("+")))
    if len(numbers) not in (2, 3):
        raise argparse.ArgumentTypeError("must be A+E or P+D+E")
    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all layouts, and print a row for each rate."""
    args = make_parser().parse_args(arguments)
    rows = []
    with random_model(MODEL) as checkpoint:
        for *attention, experts in args.layouts:
            pools = PoolSizes(num_attention=sum(attention), num_experts=experts)
            num_prefill = attention[0] if len(attention) > 1 else 0
            runs = args.rates, args.requests, args.repeats
            for found in measure(checkpoint, pools, num_prefill, *runs):
                if args.json:
                    print(json.dumps(asdict(found)), flush=True)
                rows.append([found.layout, f"{found.rate_per_s:g}", *found.columns()])
    if not args.json:
        heads = [f"{name}: REAL, PREDICTED, RATIO" for name in ("TOKENS/S", "TTFT MS", "ITL MS")]
        sys.stdout.write(table(["LAYOUT", "REQUESTS/S", *heads], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
