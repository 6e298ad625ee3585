"""Where the steps of the engine spend their time: ``python -m benchmarks.profile [MODEL]``.

The timings are those that workers always take (``workers.metrics.step_timer``), of every step.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import local_runs
from benchmarks.report.options import add_output
from cluster.cli.bench.document import document_of, format_number, show_and_save
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import note, table
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.metrics.step_timer import StepTimer, TimingSink
from workers.metrics.step_trace import StepTrace
from workers.requests.step_header import StepHeader

_TRACE_BYTES = 256 << 20
STAGES = {
    "attention": "attention and routers, of all layers",
    "dispatch": "the experts: here they compute at once, nothing is sent",
    "combine": "nothing more to do here",
    "sample": "final norm, logits, sampling, commit",
    "rest": "between these",
}


class StepSums:
    """``TimingSink`` that adds up the timings of all steps, by phase."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was."""
        self._phase = ""
        self._steps: Counter[str] = Counter()
        self._ns: dict[str, Counter[str]] = {}

    def fork(self) -> StepSums:
        return self

    def begin_step(self, header: StepHeader) -> bool:
        """Every step counts."""
        self._phase = "prefill" if header.prefill_rows else "decode"
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        """Count a timing."""
        self._ns.setdefault(self._phase, Counter())[name] += end_ns - start_ns

    def flush(self) -> None:
        """The step is done."""
        self._steps[self._phase] += 1

    def results(self) -> dict[str, Any]:
        """By phase: its steps, and the milliseconds of a mean one, whole and by stage."""
        found = {}
        for phase, steps in sorted(self._steps.items()):
            mean = {name: ns / steps / 1e6 for name, ns in self._ns[phase].items()}
            whole = mean.pop("step")
            stages = {name: mean.get(name, 0.0) for name in STAGES}
            stages["rest"] = max(0.0, whole - sum(mean.values()))
            found[phase] = {"steps": steps, "step_ms": whole, "stages_ms": stages}
        return found


def timed_by(timer: StepTimer) -> Callable[[TokenDispatcher], TokenDispatcher]:
    """Has a local engine's dispatcher time its steps (``wrap``); the caller ends each of them."""

    def measured(inner: TokenDispatcher) -> TokenDispatcher:
        assert isinstance(inner, LocalDispatcher), "a local engine has no other"
        inner.timer = timer
        return inner

    return measured


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    local_runs.add_engine_options(parser)
    parser.add_argument("--batch", type=count, default=8, metavar="B", help="sequences (8)")
    parser.add_argument(
        "--trace-dir", type=Path, metavar="DIR", help="write every step's timeline there too"
    )
    add_output(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one batch and print its mean steps."""
    args = make_parser().parse_args(arguments)
    sums = StepSums()
    sinks: list[TimingSink] = [sums]
    with ExitStack() as stack:
        stack.enter_context(local_runs.threads_kept())
        if args.trace_dir is not None:
            trace = StepTrace(args.trace_dir, "engine", _TRACE_BYTES)
            stack.callback(trace.close)
            sinks.append(trace)
        timer = StepTimer(*sinks)
        engine = local_runs.open_engine(args, args.batch, timed_by(timer))
        mine = local_runs.prompts(args, engine, args.batch)
        for new_tokens in (local_runs.WARM_UP_TOKENS, args.output_len):
            sums.clear()
            local_runs.run_batch(engine, mine, new_tokens, lambda: timer.end_step("sample"))
        options = {**local_runs.options_of(args, engine), "batch": args.batch}
    document = document_of("benchmarks.profile", options, {"phases": sums.results()})
    show_and_save(args, document, _text(document["results"]["phases"]))
    if not args.json:
        note("\n".join(f"{name}: {what}" for name, what in STAGES.items()))
    return 0


def _text(phases: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for phase, found in phases.items():
        rows.append((phase, f"{found['steps']} steps", format_number(found["step_ms"], 3), "100%"))
        for name, value in found["stages_ms"].items():
            rows.append(("", name, format_number(value, 3), f"{value / found['step_ms']:.0%}"))
    return table(("PHASE", "STAGE", "MS A STEP", "SHARE"), rows)
