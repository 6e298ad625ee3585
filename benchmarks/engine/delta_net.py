"""Gated DeltaNet in the compiled kernel and in torch: ``python -m benchmarks.engine.delta_net``.

The recurrence of one layer of Qwen3-Next-80B-A3B, without its projections, runs in bfloat16 on one
thread: for a part of a prompt (one sequence with 256 rows) and for decode steps (one row of each
sequence). The implementations take turns in one process; a time is the shortest CPU time of several
turns. The speed-up is over the faster of the two torch variants. The bound is the time to read and
write the recurrent states once, at the speed of a memory copy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report.results import table
from workers.model.attention_batch import StateRows
from workers.model.config import DeltaNetSpec
from workers.model.delta_net import DeltaNet, Mix, TorchDeltaNet
from workers.model.native.delta_net import NativeDeltaNet
from workers.model.state_runs import StateRun
from workers.native.thread_team import ThreadTeam, start_kernels

_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Rows of one step."""

    num_sequences: int
    rows_each: int
    turns: int = 5
    """Measurements of each implementation."""


SPEC = DeltaNetSpec(
    layers=(0,), num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, kernel=4
)
CASES = (
    Case(num_sequences=1, rows_each=256),
    Case(num_sequences=1, rows_each=1, turns=15),
    Case(num_sequences=8, rows_each=1, turns=15),
    Case(num_sequences=32, rows_each=1),
)
QUICK_SPEC = DeltaNetSpec(
    layers=(0,), num_key_heads=1, num_value_heads=2, key_dim=8, value_dim=8, kernel=2
)
QUICK = Case(num_sequences=2, rows_each=3, turns=1)
"""Enough to see that everything runs."""


def weights(spec: DeltaNetSpec) -> DeltaNet:
    """Return a layer with random weights."""
    draw = torch.Generator().manual_seed(1)
    heads = spec.num_value_heads
    return DeltaNet(
        spec=spec,
        conv=torch.randn(spec.kernel, spec.conv_width, generator=draw),
        rate=-torch.rand(heads, generator=draw),
        bias=torch.randn(heads, generator=draw),
        norm=torch.ones(spec.value_dim, dtype=_DTYPE),
        eps=1e-6,
    )


def step(case: Case) -> StateRows:
    """Return a step in which each sequence reads one state slot and writes another one."""
    count = case.rows_each
    runs = tuple(
        StateRun(i * count, (i + 1) * count, 2 * i, 2 * i + 1) for i in range(case.num_sequences)
    )
    places = torch.tensor([(run.first, run.last, run.read, run.write) for run in runs])
    num_decodes = case.num_sequences if count == 1 else 0
    slots = places[:num_decodes, 2:].T.contiguous()
    return StateRows(runs, places, torch.arange(len(runs) + 1), num_decodes, slots)


def measure(spec: DeltaNetSpec, case: Case, team: ThreadTeam) -> tuple[list[float], float]:
    """Return seconds of the kernel, of torch row by row and in chunks, and of the bound."""
    net, states = weights(spec), step(case)
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(case.num_sequences * case.rows_each, net.row_width, generator=draw)
    rows, cache = rows.to(_DTYPE), torch.zeros(2 * case.num_sequences, spec.layer_values)
    forms: list[Mix] = [
        NativeDeltaNet(team, net),
        TorchDeltaNet(net, row_by_row=True),
        TorchDeltaNet(net, row_by_row=False),
    ]
    kept, copied = cache[::2], torch.empty_like(cache[1::2])
    calls: Sequence[Callable[[], Tensor]] = [
        *((lambda form=form: form(rows, cache, states)) for form in forms),
        lambda: copied.copy_(kept),
    ]
    for call in calls:
        call()  # allocates the memory pages
    times = [[_seconds(call) for call in calls] for _ in range(case.turns)]
    *found, bound = (min(column) for column in zip(*times, strict=True))
    return found, bound


def _seconds(call: Callable[[], Tensor]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def section(quick: bool) -> str:
    """Return the Markdown section."""
    kernels = start_kernels(1)
    if kernels.team is None:
        return f"## Gated DeltaNet\n\nNot measured: {kernels.description}."
    spec, cases = (QUICK_SPEC, (QUICK,)) if quick else (SPEC, CASES)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = []
    for case in cases:
        times, bound = measure(spec, case, kernels.team)
        kernel, by_row, by_chunks = (seconds * 1e3 for seconds in times)
        lines.append(
            [
                f"{case.num_sequences} x {case.rows_each}",
                f"{kernel:.2f}",
                f"{by_row:.2f}",
                f"{by_chunks:.2f}",
                f"{min(by_row, by_chunks) / kernel:.1f}",
                f"{bound * 1e3 / kernel:.2f}",
            ]
        )
    torch.set_num_threads(num_threads)
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    header = ["sequences x rows", "kernel, ms", "torch, row by row, ms", "torch, in chunks, ms"]
    return (
        f"## Gated DeltaNet\n\n{about} Kernels: {kernels.description}.\n\n"
        f"{table([*header, 'speed-up over torch', 'ratio to the bound'], lines)}"
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
