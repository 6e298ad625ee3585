"""The generated pages of the reference are what the code says."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.cli.main import make_parser
from cluster.cli.options.serve_options import OPTIONS
from cluster.launch.model_source import bundled_checkpoint
from docs.generate.command_line import leaves
from docs.generate.markdown import code, prose, table
from docs.generate.metrics import labels_in_sources
from docs.generate.pages import PAGES, REFERENCE
from gateway.observability.metrics import GatewayMetrics
from gateway.protocols import ENDPOINTS
from tests.gateway.stack import running_stack
from tests.paths import ROOT
from workers.requests.request import Request, SamplingParams

OF_EVERY_SERIES = {"model_name"}


def text_of(page: str) -> str:
    return (REFERENCE / page).read_text(encoding="utf-8")


def rows_of_metrics() -> dict[str, set[str]]:
    """Labels of every metric of the page."""
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| ([^|]*) \|", text_of("metrics.md"), re.M)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def check_series(text: str) -> None:
    """Every series of an exposition is on the page, with the labels that it has."""
    rows = rows_of_metrics()
    found = set()
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("expertmesh:")
        row = rows.get(f"{name}_total" if family.type == "counter" else name)
        assert row is not None, name
        for sample in family.samples:
            of_histogram = {"le"} if sample.name.endswith("_bucket") else set()
            assert set(sample.labels) == row | OF_EVERY_SERIES | of_histogram, sample.name
        found.add(name)
    assert found


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_current(page: str) -> None:
    assert text_of(page) == PAGES[page](), "run: python -m docs.generate"


def test_every_command_has_a_section() -> None:
    sections = re.findall(r"^## (.+)$", text_of("command-line.md"), re.M)
    assert sections == ["Every command", *(name for name, _ in leaves(make_parser()))]


def test_every_option_of_serve_has_a_reason() -> None:
    flags = set(re.findall(r"--(?:no-)?([a-z][a-z0-9-]*)", text_of("configuration.md")))
    assert [option.flag for option in OPTIONS if option.key not in flags] == []


def test_every_route_has_a_section() -> None:
    sections = re.findall(r"^### (?:GET|POST|DELETE) (\S+)$", text_of("http.md"), re.M)
    assert sections == [endpoint.path for endpoint in ENDPOINTS]


def test_every_link_to_a_type_has_its_heading() -> None:
    for page in ("http.md", "grpc-services.md"):
        text = text_of(page)
        titles = re.findall(r"^#+ (.+)$", text, re.M)
        anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_series_of_a_gateway_are_on_the_page() -> None:
    with running_stack() as stack:
        stack.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        check_series(stack.http.get("/metrics").text)


def test_series_of_real_workers_are_on_the_page() -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    request = Request(request_id="r", prompt=tuple(range(10, 40)), params=params)
    with serving(ThreadCluster(make_config(bundled_checkpoint(), 1, 1))) as cluster:
        cluster.answers([request])
        snapshot = cluster.wait(
            lambda found: any("bubble_seconds" in str(w["stats"]) for w in found["workers"]),
            fresh=True,
        )
    config = {"block_size": "16", "cache_dtype": "auto", "enable_prefix_caching": "True"}
    check_series(GatewayMetrics("tiny", lambda: snapshot, config).render().decode())


def test_labels_are_read_from_the_sources() -> None:
    found = labels_in_sources()
    assert found["dispatch_bytes_total"] == {"direction"}
    assert found["kv_migration_seconds"] == {"reason"}


def test_text_is_shown_literally() -> None:
    assert prose("a ``b<c>``  of [d]\nand <e>") == r"a `b<c>` of \[d\] and \<e\>"
    assert table(("a", "b"), [(code("x|y"), "")]) == "| a | b |\n| --- | --- |\n| `x\\|y` |  |"
    assert table(("a",), []) == ""


def test_the_product_does_not_import_the_documents() -> None:
    for folder in ("cluster", "workers", "gateway", "protos"):
        for source in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) docs\b", source.read_text(), re.M), source
