"""Prometheus metrics of the experts: their tokens, copies and balance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.core.metric_families import PlainFamily
from gateway.observability.cluster_metrics import REST

ALL = "all"
"""Value of the labels ``layer`` and ``bank`` of a series for all layers together."""
_PHASES = ("prefill", "decode")


def load_families(document: Mapping[str, Any], all_experts: bool) -> Iterator[PlainFamily]:
    """Yield the metrics in the controller's load document (``/cluster/v1/load``).

    With ``all_experts`` each expert has a series; otherwise only the busiest ones of each bank.
    """
    banks = document["banks"]
    yield {
        "name": "expert_tokens",
        "text": "Tokens of committed steps by logical expert; `rest` sums experts without a series",
        "type": "counter",
        "samples": [
            ["expert_tokens_total", {**_labels(bank), "expert": expert}, tokens]
            for bank in banks
            for expert, tokens in _tokens(bank, all_experts).items()
        ],
    }
    copies = [
        ({**_labels(bank), "copies": str(number)}, bank["copies"].count(number))
        for bank in banks
        for number in sorted(set(bank["copies"]))
    ]
    yield _gauge("expert_replicas", "Number of experts, by their number of copies", copies)
    at_risk = [(_labels(bank), bank["at_risk"]) for bank in banks]
    yield _gauge("experts_at_risk", "Experts whose copies are all in one failure domain", at_risk)
    everything = {"layer": ALL, "bank": ALL, "phases": document.get("phases", {})}
    for name in ("achieved", "predicted"):
        values = [
            ({**_labels(bank), "phase": phase}, value)
            for bank in (everything, *banks)
            for phase in _PHASES
            if (value := bank["phases"].get(phase, {}).get(name)) is not None
        ]
        text = f"Mean load of the expert workers divided by the maximum, {name}; 1 is ideal"
        yield _gauge(f"expert_load_balancedness_{name}", text, values)


def _labels(bank: Mapping[str, Any]) -> dict[str, str]:
    return {"layer": str(bank["layer"]), "bank": str(bank["bank"])}


def _tokens(bank: Mapping[str, Any], all_experts: bool) -> dict[str, int]:
    counts = bank["counts"]
    if all_experts:
        return {str(expert): count for expert, count in enumerate(counts)}
    watched = zip(map(str, bank["watched"]), bank["watched_tokens"], strict=True)
    return {**dict(watched), REST: bank["rest_tokens"]}


def _gauge(name: str, text: str, values: list[tuple[dict[str, str], float]]) -> PlainFamily:
    samples = [[name, labels, value] for labels, value in values]
    return {"name": name, "text": text, "type": "gauge", "samples": samples}
