"""The samples of one scrape, to be compared with those of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

PREFIX = "expertmesh:"


@dataclass(frozen=True, slots=True)
class Scrape:
    """What ``/metrics`` says; names are without the prefix."""

    families: dict[str, Metric]

    @classmethod
    def of(cls, text: str) -> Scrape:
        """Raises ``AssertionError`` where a series is there twice, or has another prefix."""
        found = list(text_string_to_metric_families(text))
        assert all(family.name.startswith(PREFIX) for family in found)
        families = {family.name.removeprefix(PREFIX): family for family in found}
        assert len(families) == len(found)
        scrape = cls(families)
        series = [(s.name, *sorted(s.labels.items())) for s in scrape.samples()]
        assert len(series) == len(set(series))
        return scrape

    def samples(self, name: str = "") -> Iterator[Sample]:
        """All samples, or those of one name."""
        for family in self.families.values():
            for sample in family.samples:
                if not name or sample.name == PREFIX + name:
                    yield sample

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 without any."""
        found = self.samples(name)
        return sum(s.value for s in found if labels.items() <= s.labels.items())

    def since(self, before: Scrape, name: str, **labels: str) -> float:
        """How far a counter has grown."""
        return self.value(name, **labels) - before.value(name, **labels)

    def label_values(self) -> dict[str, set[str]]:
        """By label the values that it has anywhere, but for bounds of buckets."""
        values: dict[str, set[str]] = {}
        for sample in self.samples():
            for label, value in sample.labels.items():
                if label != "le":
                    values.setdefault(label, set()).add(value)
        return values
