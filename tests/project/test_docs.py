"""Files, links and headings that the documents name, and the index of all documents."""

from __future__ import annotations

import re

import pytest

from tests.paths import ROOT

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "k8s" / "README.md", *DOCS.glob("*.md"))
_FOLDERS = "cluster|workers|gateway|protos|tests|benchmarks|docs|k8s|served|system|pretend_hosts"


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in sorted(PAGES)])
def test_every_named_file_and_link_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(rf"`((?:{_FOLDERS})/[\w./-]+)(?:::\w+)?`", text)
    missing = [p for p in paths if not (ROOT / p).exists() and not (ROOT / "tests" / p).exists()]
    assert missing == []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text(encoding="utf-8")), anchor


def test_the_index_lists_every_document() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^- \[[^]]+\]\(([^)]+)\)", index, re.M)
    assert sorted(named) == sorted(
        {f.name for f in DOCS.glob("*.md")} - {"index.md"} | {"../README.md", "../k8s/README.md"}
    )


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
