"""Prometheus metrics of the experts: their tokens, their copies, and how well they are balanced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

REST = "rest"
"""Label of all experts of a bank that have no series of their own."""
ALL = "all"
"""Label of all layers together."""
_BANK = ("model_name", "layer", "bank")
_PHASES = ("prefill", "decode")


@dataclass(frozen=True, eq=False)
class LoadCollector(Collector):
    """The controller's load document, read at each scrape.

    Args:
        model_name: label of every series.
        prefix: in front of every name.
        load: gives the document (``/cluster/v1/load``), None while it is not known.
        all_experts: a series for every expert; else for the busiest of each bank, and the rest.
    """

    model_name: str
    prefix: str
    load: Callable[[], Mapping[str, Any] | None]
    all_experts: bool

    def collect(self) -> Iterator[Metric]:
        """Nothing while the load is not known."""
        document = self.load()
        if document is None:
            return
        yield self._tokens(document)
        yield self._copies(document)
        yield self._at_risk(document)
        for name in ("achieved", "predicted"):
            yield self._balancedness(document, name)

    def _labels(self, bank: Mapping[str, Any]) -> tuple[str, str, str]:
        return self.model_name, str(bank["layer"]), str(bank["bank"])

    def _tokens(self, document: Mapping[str, Any]) -> Metric:
        text = "Tokens routed to a logical expert in committed steps"
        family = CounterMetricFamily(self.prefix + "expert_tokens", text, labels=(*_BANK, "expert"))
        for bank in document["banks"]:
            counts, labels = bank["counts"], self._labels(bank)
            named = range(len(counts)) if self.all_experts else bank["watched"]
            for expert in named:
                family.add_metric((*labels, str(expert)), counts[expert])
            if not self.all_experts:
                rest = sum(counts) - sum(counts[expert] for expert in named)
                family.add_metric((*labels, REST), rest)
        return family

    def _copies(self, document: Mapping[str, Any]) -> Metric:
        text = "Experts by their number of copies"
        family = GaugeMetricFamily(self.prefix + "expert_replicas", text, labels=(*_BANK, "copies"))
        for bank in document["banks"]:
            copies = bank["copies"]
            for number in sorted(set(copies)):
                family.add_metric((*self._labels(bank), str(number)), copies.count(number))
        return family

    def _at_risk(self, document: Mapping[str, Any]) -> Metric:
        text = "Experts whose copies share one failure domain"
        family = GaugeMetricFamily(self.prefix + "experts_at_risk", text, labels=_BANK)
        for bank in document["banks"]:
            family.add_metric(self._labels(bank), bank["at_risk"])
        return family

    def _balancedness(self, document: Mapping[str, Any], name: str) -> Metric:
        text = "Mean over maximum load of the expert workers; 1 is ideal"
        family = GaugeMetricFamily(
            f"{self.prefix}expert_load_balancedness_{name}", text, labels=(*_BANK, "phase")
        )
        everything = {"layer": ALL, "bank": ALL, "phases": document.get("phases", {})}
        for bank in (everything, *document["banks"]):
            for phase in _PHASES:
                value = bank["phases"].get(phase, {}).get(name)
                if value is not None:
                    family.add_metric((*self._labels(bank), phase), value)
        return family
