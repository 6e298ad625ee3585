"""Speed of two cores as 2 colocated workers, as 1 attention + 1 expert worker, and as one process.

All layouts stay loaded and take turns, so that other load on the machine affects them alike.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.report.results import table
from benchmarks.report.timing import median_of, ratio_of
from benchmarks.serving.throughput import QUICK, TINY, Case, Results, measure, random_model
from cluster.launch.model_source import bundled_checkpoint

LOCAL, APART, TOGETHER = "local", "ray", "ray-colocated"
SYSTEMS = (LOCAL, APART, TOGETHER)
LABELS = {LOCAL: "local engine", APART: "1 + 1 workers", TOGETHER: "2 colocated workers"}
"""Labels in the table."""
CASE = Case(systems=SYSTEMS)


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
    head = ["batch, layout", "tokens/s", "prefill, s", "decode tokens/s", "ITL, ms"]
    head += ["decode / local engine", "decode / 1 + 1 workers", "other load"]
    rows = []
    for batch, samples in results.items():
        for name in SYSTEMS:
            mine = median_of(samples[name])
            ratios = [ratio_of(samples[name], samples[base]).decode for base in (LOCAL, APART)]
            rows.append(
                [
                    f"{batch}, {LABELS[name]}",
                    f"{mine.tokens_per_s:.1f}",
                    f"{mine.prefill_s:.3f}",
                    f"{mine.decode_tokens_per_s:.1f}",
                    f"{mine.itl_ms:.2f}",
                    *[f"{ratio:.2f}" for ratio in ratios],
                    f"{mine.others_cores:.1f}",
                ]
            )
    return f"### {title}\n\n{table(head, rows)}"


def _words(case: Case) -> str:
    return (
        "## Colocated workers\n\nTwo cores run 2 colocated workers, 1 attention + 1 expert worker "
        "(one compute thread each), or one process with two threads (local engine). Prompts have "
        f"{case.prompt_tokens} random tokens; {case.new_tokens} new tokens are sampled greedily. "
        f"Sequences go to colocated workers round-robin. Medians of {case.repeats} runs; ratios "
        "are medians of the ratios within a run. Other load: CPU cores that other processes used."
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
