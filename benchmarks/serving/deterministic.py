"""Cost of ``--deterministic`` in one process and in 1 + 1 workers.

All systems stay loaded and take turns, so that other load on the machine affects them alike.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.report.results import table
from benchmarks.report.timing import median_of, ratio_of
from benchmarks.serving.throughput import QUICK, TINY, Case, Results, measure, random_model
from cluster.launch.model_source import bundled_checkpoint

PAIRS = (("local-off", "local-deterministic"), ("ray-off", "ray-deterministic"))
"""Pairs of systems: (without the option, with it)."""
LABELS = {"local-off": "local engine", "ray-off": "1 + 1 workers"}
SYSTEMS = tuple(name for pair in PAIRS for name in pair)
CASE = Case(new_tokens=24, repeats=2, systems=SYSTEMS, patience_s=1.0)


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = replace(QUICK, systems=SYSTEMS) if quick else CASE
    model = TINY if quick else RandomModel()
    parts = [_words(case), report("Bundled checkpoint", measure(bundled_checkpoint(), case))]
    with random_model(model) as checkpoint:
        title = f"Random OLMoE: hidden {model.hidden}, {model.layers} layers, ffn {model.ffn}"
        parts.append(report(title, measure(checkpoint, case)))
    return "\n\n".join(parts)


def report(title: str, results: Results) -> str:
    """Return a table with a row for each batch size and layout."""
    head = ["batch, layout", "off: tokens/s", "on: tokens/s", "on / off, tokens/s"]
    head += ["off: prefill, s", "on: prefill, s", "on / off, decode tokens/s"]
    rows = []
    for batch, samples in results.items():
        for without, with_it in PAIRS:
            off, on = median_of(samples[without]), median_of(samples[with_it])
            ratio = ratio_of(samples[with_it], samples[without])
            total = [f"{off.tokens_per_s:.1f}", f"{on.tokens_per_s:.1f}", f"{ratio.total:.2f}"]
            prefill = [f"{s.prefill_s:.3f}" for s in (off, on)]
            rows.append([f"{batch}, {LABELS[without]}", *total, *prefill, f"{ratio.decode:.2f}"])
    return f"### {title}\n\n{table(head, rows)}"


def _words(case: Case) -> str:
    return (
        "## Deterministic\n\nOne process (local engine), and 1 attention + 1 expert worker, with "
        f"`--deterministic` on and off, in bfloat16. Prompts have {case.prompt_tokens} random "
        f"tokens; {case.new_tokens} new tokens are sampled greedily. Medians of "
        f"{case.repeats} runs; ratios are medians of the ratios within a run."
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
