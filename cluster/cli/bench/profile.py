"""``bench profile``: where the steps of the engine spend their time.

The spans are those that workers always measure (``workers.dist.traced``), of every step.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.bench import local_runs
from cluster.cli.bench.document import add_save, count, document_of, shown, tell
from cluster.cli.exit_codes import ExitCode
from cluster.cli.terminal import note, table

if TYPE_CHECKING:
    from workers.dist.dispatcher import TokenDispatcher
    from workers.dist.header import StepHeader
    from workers.dist.traced import SpanSink, TracedDispatcher

_TRACE_BYTES = 256 << 20
STAGES = {
    "attention": "attention and routers, of all layers",
    "dispatch": "the experts: here they compute at once, nothing is sent",
    "combine": "nothing more to do here",
    "sample": "final norm, logits, drawing of tokens, commit",
    "rest": "between these",
}


class SpanSums:
    """``SpanSink`` that adds up the spans of all steps, by phase."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was."""
        self._phase = ""
        self._steps: Counter[str] = Counter()
        self._ns: dict[str, Counter[str]] = {}

    def begin_step(self, header: StepHeader) -> bool:
        """Every step counts."""
        self._phase = "prefill" if header.prefill_rows else "decode"
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        """Count a span."""
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


def add_command(kinds: Any, common: argparse.ArgumentParser) -> None:
    """Register ``bench profile``."""
    parser = kinds.add_parser(
        "profile", parents=[common], help="where the engine's steps spend their time"
    )
    local_runs.add_engine_options(parser)
    parser.add_argument("--batch", type=count, default=8, metavar="B", help="sequences (8)")
    parser.add_argument(
        "--trace-dir", type=Path, metavar="DIR", help="write every step's timeline there too"
    )
    add_save(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run one batch and tell its mean steps."""
    from workers.checkpoint import Checkpoint
    from workers.dist.traced import TracedDispatcher
    from workers.step_trace import StepTrace

    sums = SpanSums()
    sinks: list[SpanSink] = [sums]
    traced: list[TracedDispatcher] = []

    def measured(inner: TokenDispatcher) -> TokenDispatcher:
        banks = Checkpoint(local_runs.source_of(args).folder).family.banks
        traced.append(TracedDispatcher(inner, sinks, banks))
        return traced[0]

    with ExitStack() as stack:
        stack.enter_context(local_runs.threads_kept())
        if args.trace_dir is not None:
            trace = StepTrace(args.trace_dir, "engine", _TRACE_BYTES)
            stack.callback(trace.close)
            sinks.append(trace)
        engine = local_runs.open_engine(args, args.batch, measured)
        mine = local_runs.prompts(args, engine, args.batch)
        for new_tokens in (local_runs.WARM_UP_TOKENS, args.output_len):
            sums.clear()
            local_runs.run_batch(engine, mine, new_tokens, traced[0].end_step)
        options = {**local_runs.options_of(args, engine), "batch": args.batch}
    document = document_of("profile", options, {"phases": sums.results()})
    tell(args, document, _text(document["results"]["phases"]))
    if not args.json:
        note("\n".join(f"{name}: {what}" for name, what in STAGES.items()))
    return ExitCode.OK


def _text(phases: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for phase, found in phases.items():
        rows.append((phase, f"{found['steps']} steps", shown(found["step_ms"], 3), "100%"))
        for name, value in found["stages_ms"].items():
            rows.append(("", name, shown(value, 3), f"{value / found['step_ms']:.0%}"))
    return table(("PHASE", "STAGE", "MS A STEP", "SHARE"), rows)
