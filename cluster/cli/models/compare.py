"""``models compare``: error rates, latencies and log-probabilities of two revisions of a model."""

from __future__ import annotations

import argparse
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.exposition import read_series
from cluster.cli.terminal.output import show, table
from cluster.core.model_table import FIRST_REVISION, REVISION_HEADER

_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n",
    "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048",
    "Water boils at 100 degrees Celsius at sea level, and freezes at 0 degrees.",
    "Der Zug nach Wien fährt um acht Uhr ab und kommt gegen Mittag an.",
    '{"name": "Ada", "born": 1815, "works": ["notes", "letters"], "is_known": true}',
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat.",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY name ORDER BY 2 DESC;",
)
"""Texts of several kinds, for which the drift of log-probabilities is measured by default."""
_HISTOGRAMS = {"ttft": "time_to_first_token_seconds", "itl": "inter_token_latency_seconds"}
_NAMES = "|".join(("request_success_total", *(f"{n}_bucket" for n in _HISTOGRAMS.values())))
_QUANTILES = {"p50": 0.5, "p99": 0.99}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "Revision to compare (default: the canary, or the only other one)"
    parser.add_argument("--revision", metavar="NAME", default="", help=text)
    text = "File with a prompt in each line, in place of the built-in texts"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=text)


def compare(args: argparse.Namespace, model: Mapping[str, Any]) -> int:
    """Print what the metrics say of two revisions, and the drift on fixed prompts.

    ``model``: the model's entry in the table of models.
    """
    names = (str(model["active"]), _other(model, args.revision))
    prompts = _prompts(args.prompts)
    counts = measured(Client(args).get_text("/metrics"), args.served)
    scores = [_scores(args, name, prompts) for name in names]
    if [token for token, _ in scores[0]] != [token for token, _ in scores[1]]:
        raise CommandError(ExitCode.FAILED, "the revisions divide the prompts into other tokens")
    flat = [[score for _, score in revision] for revision in scores]
    found = [
        {"name": name, **counts.get(name, measured_nothing()), "perplexity": _perplexity(each)}
        for name, each in zip(names, flat, strict=True)
    ]
    drift = [abs(a - b) for a, b in zip(*flat, strict=True)]
    document = {
        "schema": 1,
        "model": args.served,
        "revisions": found,
        "drift": {"tokens": len(drift), "mean": sum(drift) / len(drift), "worst": max(drift)},
    }
    return show(args, document, lambda: _text(document))


def _other(model: Mapping[str, Any], wanted: str) -> str:
    """Return the name of the revision to compare with the active one. Raises ``CommandError``."""
    ready = [r["name"] for r in model["revisions"] if r["state"] == "READY"]
    others = [name for name in ready if name != model["active"]]
    if model["active"] not in ready:
        raise CommandError(ExitCode.NOT_READY, f"the active revision of {model['name']} is away")
    if wanted and wanted not in others:
        text = ", ".join(others) or "none"
        raise CommandError(ExitCode.REFUSED, f"--revision ({wanted}) must be another one: {text}")
    wanted = wanted or (model["canary"] if model["canary"] in others else "")
    if not wanted and len(others) != 1:
        what = "several are ready" if others else "no other one is ready"
        raise CommandError(ExitCode.REFUSED, f"name a revision of {model['name']}: {what}")
    return str(wanted or others[0])


def _prompts(path: Path | None) -> Sequence[str]:
    """Return the prompts of a file, or the built-in ones. Raises ``CommandError``."""
    if path is None:
        return _PROMPTS
    try:
        lines = path.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise CommandError(ExitCode.USAGE, f"--prompts ({path}) cannot be read: {err}") from err
    if not (found := [line for line in lines if line.strip()]):
        raise CommandError(ExitCode.USAGE, f"--prompts ({path}) has no prompt")
    return found


def _scores(
    args: argparse.Namespace, revision: str, prompts: Sequence[str]
) -> list[tuple[str, float]]:
    """Return the tokens of all prompts but the first of each, with their log-probabilities."""
    client = Client(args, headers={REVISION_HEADER: revision})
    fields = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    found: list[tuple[str, float]] = []
    for prompt in prompts:
        body = {"model": args.served, "prompt": prompt, **fields}
        (choice,) = client.run_model("/v1/completions", body)["choices"]
        for entry in filter(None, choice["prompt_logprobs"]):
            token, score = next(iter(entry.items()))
            found.append((token, float(score["logprob"])))
    if not found:
        raise CommandError(ExitCode.USAGE, "--prompts must have a prompt of two tokens or more")
    return found


def measured(text: str, model: str) -> dict[str, dict[str, Any]]:
    """Return the numbers of each revision of a model in a Prometheus exposition.

    ``choices`` that ended, the share ``errors`` of these, and by ``_HISTOGRAMS`` and
    ``_QUANTILES`` the latencies in seconds, such as ``ttft_p50_s``; None without a choice.
    """
    ended: dict[str, Counter[str]] = {}
    buckets: dict[tuple[str, str], Counter[float]] = {}
    for name, labels, value in read_series(text, _NAMES):
        if labels.get("model_name") != model:
            continue
        revision = labels.get("revision", FIRST_REVISION)
        if name.endswith("_bucket"):
            of_name = buckets.setdefault((revision, name.removesuffix("_bucket")), Counter())
            of_name[float(labels["le"])] += value  # type: ignore[assignment]
        else:
            of_revision = ended.setdefault(revision, Counter())
            of_revision[labels["finished_reason"]] += int(value)
    found = {}
    for revision, reasons in ended.items():
        number = reasons.total()
        found[revision] = {
            **measured_nothing(),
            "choices": number,
            "errors": reasons["error"] / number if number else None,
        }
        for short, name in _HISTOGRAMS.items():
            for label, share in _QUANTILES.items():
                counts = buckets.get((revision, name), Counter())
                found[revision][f"{short}_{label}_s"] = quantile(counts, share)
    return found


def measured_nothing() -> dict[str, Any]:
    """Return the numbers of a revision without choices."""
    latencies = [f"{short}_{label}_s" for short in _HISTOGRAMS for label in _QUANTILES]
    return {"choices": 0, "errors": None, **dict.fromkeys(latencies)}


def quantile(counts: Mapping[float, float], share: float) -> float | None:
    """Return a quantile of a histogram as Prometheus' ``histogram_quantile`` does; None if empty.

    ``counts``: cumulative numbers of values by upper bound.
    """
    bounds = sorted(counts)
    if not bounds or not counts[bounds[-1]]:
        return None
    rank = share * counts[bounds[-1]]
    place = bisect_left([counts[bound] for bound in bounds], rank)
    low, high = list(pairwise([0.0, *bounds]))[place]
    if math.isinf(high):
        return low
    below = counts[bounds[place - 1]] if place else 0.0
    return low + (high - low) * (rank - below) / (counts[high] - below)


def _perplexity(scores: Sequence[float]) -> float:
    return math.exp(-sum(scores) / len(scores))


def _text(document: Mapping[str, Any]) -> str:
    rows = [
        (
            one["name"],
            one["choices"],
            "-" if one["errors"] is None else f"{one['errors']:.2%}",
            *(_latencies(one, short) for short in _HISTOGRAMS),
            f"{one['perplexity']:.4g}",
        )
        for one in document["revisions"]
    ]
    drift = document["drift"]
    header = ("REVISION", "CHOICES", "ERRORS", "TTFT p50 / p99", "ITL p50 / p99", "PERPLEXITY")
    return (
        f"{table(header, rows)}\n"
        f"log-probabilities of {drift['tokens']} prompt tokens differ by {drift['mean']:.4g} on "
        f"average, at most by {drift['worst']:.4g}"
    )


def _latencies(revision: Mapping[str, Any], short: str) -> str:
    values = [revision[f"{short}_{label}_s"] for label in _QUANTILES]
    return " / ".join("-" if v is None else f"{1e3 * v:.3g} ms" for v in values)
