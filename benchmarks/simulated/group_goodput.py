"""Goodput of step groups against one group of as many workers, on a trace of a chat service.

    python -m benchmarks.simulated.group_goodput [--json]

The rate of a layout is the highest at which 90% of the requests meet the goals of TTFT and TPOT, in
virtual time (``cluster.simulation``). The requests are those of the Azure conversation trace, which
arrive faster or slower by a factor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.simulated.request_trace import azure_arrivals
from benchmarks.sizing.guide import known_model
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.config.cluster import EngineSection
from cluster.config.resources import WorkerShare
from cluster.config.workers import WorkersSection
from cluster.simulation.serving import ServingSimulation
from cluster.sizing.devices import worker_device
from cluster.sizing.group_steps import GroupSizes, GroupSteps, choose_sharing
from cluster.sizing.mixed_step import PoolSizes, StepTimes
from cluster.sizing.roofline import DeviceSpec, ModelSize
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import Tally
from workers.engine.micro_batches import MicroBatchRule

MODEL = "OLMoE-1B-7B-0924"
ENGINE = EngineSection(max_num_seqs=32)
SIZES = ((1, 1, 2), (1, 2, 3), (2, 2, 4))
"""Numbers of prefill, decode and expert workers."""
GOALS = ({"ttft": 5000.0, "tpot": 80.0}, {"ttft": 5000.0, "tpot": 160.0}, {"ttft": 2500.0})
"""Goals in milliseconds."""
_ATTAINMENT = 0.9
_CONTEXT = 1000
"""Mean tokens of a request, for the choice of ``auto``."""
_MAX_LEN = 16384
_NUM_TRIALS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Highest rates at which layouts of as many workers meet the goals."""

    workers: str
    goals: str
    one_group: float
    """Requests per second of one group."""
    shared: float
    """Rate of two groups that share experts, by that of one group."""
    own: float
    """Rate of two groups with expert workers of their own, by that of one group."""
    auto: str
    """What ``--share-experts auto`` chooses, ``shared`` or ``own``."""

    def columns(self) -> list[str]:
        """Return a row of the table."""
        ratios = (self.shared, self.own)
        rates = (f"{self.one_group:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
        return [self.workers, self.goals, *rates, self.auto]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A cluster in virtual time."""

    model: ModelSize
    device: DeviceSpec
    pools: PoolSizes
    groups: GroupSizes | None
    """None: one group of all attention workers."""

    def good_share(self, arrivals: Sequence[Arrival], goals: Mapping[str, float]) -> float:
        """Return the share of requests that meet the goals."""
        sizes = self.groups
        groups = None if sizes is None else GroupSteps(self.model, sizes, self.device)
        simulation = ServingSimulation(
            StepTimes(self.model, self.pools, self.device),
            ENGINE,
            num_attention=self.pools.num_attention,
            num_kv_blocks=ENGINE.max_num_seqs * _MAX_LEN // ENGINE.block_size_tokens,
            max_model_len=_MAX_LEN,
            micro_batches=MicroBatchRule(),
            groups=groups,
        )
        tally = Tally(goals)
        simulation.run(arrivals, tally, lambda: None)
        return tally.good / len(arrivals)

    def highest_rate(self, number: int, goals: Mapping[str, float]) -> float:
        """Return the highest rate at which the goals are met, in requests per second."""
        traced = azure_arrivals()[:number]
        low, high = 0.0, 4.0
        for _ in range(_NUM_TRIALS):
            speed = (low + high) / 2 if low else high / 4
            arrivals = [Arrival(a.time_s / speed, a.prompt_tokens, a.output_tokens) for a in traced]
            if self.good_share(arrivals, goals) >= _ATTAINMENT:
                low = speed
            else:
                high = speed
        return low * number / traced[-1].time_s


def measure(cores: int, number: int) -> Iterator[Found]:
    """Yield the rates of each layout and goal, for workers of some cores each."""
    model = known_model(MODEL).size
    device = worker_device(WorkerShare(cpus=cores, gpus=0.0, device="cpu"), 1)
    for prefill, decode, experts in SIZES:
        shared = WorkersSection(
            num_prefill_workers=prefill, num_decode_workers=decode, num_expert_workers=experts
        )
        auto = choose_sharing(
            replace(shared, share_experts="auto"),
            model,
            num_seqs=ENGINE.max_num_seqs,
            step_tokens=ENGINE.step_tokens,
            context_tokens=_CONTEXT,
            device=device,
        )
        pools = PoolSizes(num_attention=prefill + decode, num_experts=experts)
        sections = (None, shared, replace(shared, share_experts="no"))
        layouts = [
            Layout(
                model=model,
                device=device,
                pools=pools,
                groups=None if each is None else GroupSizes.of(each),
            )
            for each in sections
        ]
        for goals in GOALS:
            one, *others = (layout.highest_rate(number, goals) for layout in layouts)
            first, second = (rate / max(one, 1e-9) for rate in others)
            yield Found(
                workers=f"{prefill} + {decode} + {experts}",
                goals=", ".join(f"{name} {goal:.0f} ms" for name, goal in goals.items()),
                one_group=one,
                shared=first,
                own=second,
                auto="shared" if auto.share_experts == "yes" else "own",
            )


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated.group_goodput")
    parser.add_argument("--cores", type=count, default=16, help="of a worker (16)")
    parser.add_argument("--requests", type=count, default=300, help="of the trace (300)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rates of each layout and goal."""
    args = make_parser().parse_args(arguments)
    rows = []
    for found in measure(args.cores, args.requests):
        if args.json:
            print(json.dumps(asdict(found)), flush=True)
        rows.append(found.columns())
    if not args.json:
        heads = ["WORKERS", "GOALS", "ONE GROUP", "SHARED", "OWN", "AUTO"]
        sys.stdout.write(table(heads, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
