"""``docs/reference/metric-names.md`` against what ``/metrics`` has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from gateway.observability.cluster_metrics import TOTAL_TEXTS, WORKER_TEXTS
from gateway.observability.vllm_names import BY_SOURCE, OLDER_VLLM_NAMES, VLLM_NAMES
from tests.gateway.stack import Stack, complete
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "reference" / "metric-names.md").read_text(encoding="utf-8")
EVERYWHERE = {"model_name", "le"}


class Row(NamedTuple):
    """A metric's row."""

    name: str
    labels: str
    text: str
    vllm: str
    sglang: str


def rows() -> Iterator[Row]:
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            yield Row(cells[0].strip("| `"), *cells[1:])


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def exported(stack: Stack) -> dict[str, set[str]]:
    """Names, a counter's with ``_total``, with labels."""
    complete(stack, prompt="hello", max_tokens=3)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(stack.http.get("/metrics").text):
        name = family.name.removeprefix("expertmesh:")
        name += "_total" if family.type == "counter" else ""
        found[name] = {label for s in family.samples for label in s.labels} - EVERYWHERE
    return found


def test_the_page_has_every_metric_once_and_no_other(stack: Stack) -> None:
    names = [row.name for row in rows()]
    assert len(names) == len(set(names))
    assert set(names) == exported(stack).keys() | WORKER_TEXTS.keys() | TOTAL_TEXTS.keys()


def test_the_page_has_the_labels(stack: Stack) -> None:
    """Of metrics that the scripted cluster has series of."""
    found = exported(stack)
    for row in rows():
        if labels := found.get(row.name):
            assert names_in(row.labels) == labels, row.name


def test_what_is_said_to_be_the_same_is_exported_under_vllm_s_name() -> None:
    same = {row.name.removesuffix("_total") for row in rows() if row.vllm.startswith("same")}
    histograms = {"iteration_tokens_total"}  # whose name ends like a counter's
    same = same - {name.removesuffix("_total") for name in histograms} | histograms
    assert same == VLLM_NAMES
    others = {name for row in rows() for name in names_in(row.vllm)}
    older = {name for new, name in OLDER_VLLM_NAMES.items() if new in VLLM_NAMES}
    assert {name for name in older if f"`{name}" not in PAGE} == set()
    assert f"`{BY_SOURCE}_total" in PAGE
    assert {"gpu_cache_usage_perc", "gpu_prefix_cache_hits_total", "http_requests_total"} <= others


def test_each_row_says_what_it_is() -> None:
    for row in rows():
        assert len(row.text.split()) >= 2, row.name
        assert row.vllm, row.name
        assert row.sglang, row.name
