"""Speed of 1 + 1 workers with one and with two micro-batches in a step.

Both clusters stay loaded and take turns, so that other load on the machine affects them alike. The
thresholds of ``--num-micro-batches auto`` (``cluster.config.cluster.EngineSection``) follow from
these measurements.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.report.results import table
from benchmarks.report.timing import median_of, ratio_of
from benchmarks.serving.throughput import QUICK, TINY, Case, Results, measure, random_model
from cluster.launch.model_source import bundled_checkpoint

ONE, TWO = "ray-one-micro-batch", "ray-two-micro-batches"
CASE = Case(
    batches=(8, 16, 32, 64), prompt_tokens=64, new_tokens=24, systems=(ONE, TWO), patience_s=3.0
)
"""Batch sizes around the one from which two micro-batches are faster."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = replace(QUICK, systems=(ONE, TWO)) if quick else CASE
    model = TINY if quick else RandomModel()
    parts = [_words(case), report("Bundled checkpoint", measure(bundled_checkpoint(), case))]
    with random_model(model) as checkpoint:
        title = f"Random OLMoE: hidden {model.hidden}, {model.layers} layers, ffn {model.ffn}"
        parts.append(report(title, measure(checkpoint, case)))
    return "\n\n".join(parts)


def report(title: str, results: Results) -> str:
    """Return a table with a row for each batch size."""
    head = ["batch", "one: decode tokens/s", "two: decode tokens/s", "two / one, decode tokens/s"]
    head += ["one: prefill, s", "two: prefill, s", "two / one, tokens/s", "other load"]
    rows = []
    for batch, samples in results.items():
        one, two = median_of(samples[ONE]), median_of(samples[TWO])
        ratio = ratio_of(samples[TWO], samples[ONE])
        decode = [f"{s.decode_tokens_per_s:.1f}" for s in (one, two)]
        prefill = [f"{s.prefill_s:.3f}" for s in (one, two)]
        row = [str(batch), *decode, f"{ratio.decode:.2f}", *prefill, f"{ratio.total:.2f}"]
        rows.append([*row, f"{max(one.others_cores, two.others_cores):.1f}"])
    return f"### {title}\n\n{table(head, rows)}"


def _words(case: Case) -> str:
    return (
        "## Two micro-batches\n\n1 attention and 1 expert worker with one compute thread each run "
        "with one and with two micro-batches in all steps (`--num-micro-batches`). Prompts have "
        f"{case.prompt_tokens} random tokens; {case.new_tokens} new tokens are sampled greedily. "
        f"Medians of {case.repeats} runs; ratios are medians of the ratios within a run. Other "
        "load: CPU cores that other processes used. Two micro-batches are slower if a worker has "
        "to share its core."
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
