"""Files, links and headings that the documents name, the index of all documents, and the site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.extensions.repository_pages import DOCS, SHOWN, site_text
from tests.paths import ROOT
from workers.model.families.registry import FAMILIES

OURS = sorted(DOCS.rglob("*.md"))
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "k8s" / "README.md", *OURS)
_FOLDERS = "cluster|workers|gateway|protos|tests|benchmarks|docs|k8s|served|system|pretend_hosts"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning of Sphinx, such as a link without a target, is an error."""
    folder = tmp_path_factory.mktemp("site")
    strict = ["--fresh-env", "--fail-on-warning", "--keep-going", "--quiet"]
    command = [sys.executable, "-m", "sphinx", "--builder", "html", *strict, str(DOCS), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
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
    assert sorted(named) == sorted(str(f.relative_to(DOCS)) for f in OURS if f.name != "index.md")


@pytest.mark.slow
def test_the_site_has_every_page(site: Path) -> None:
    for page in OURS:
        text = (site / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert text.count("<h1>") == 1, page


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"([^\"]+)\"", text)
        assert loaded
        assert [found for found in loaded if re.match(r"(https?:)?//", found)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_the_site_shows_files_of_other_folders(site: Path) -> None:
    shown = (site / "repository" / "readme.html").read_text(encoding="utf-8")
    assert "Life of a request" in shown
    assert 'href="../explanation/glossary.html"' in shown


def test_links_of_a_shown_file_lead_to_pages() -> None:
    page, readme = DOCS / "repository" / "readme.md", SHOWN["repository/readme"]
    text = "[a](docs/index.md), [b](CHANGELOG.md#top), [c](k8s), [d](https://e), ![f](g.svg)"
    assert site_text(text, readme, page) == (
        "[a](../index.md), [b](changes.md#top), c, [d](https://e), ![f](../../g.svg)"
    )


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_family_is_listed_with_the_lines_of_its_file() -> None:
    text = (DOCS / "reference" / "models.md").read_text(encoding="utf-8")
    families = ROOT / "workers" / "model" / "families"
    said = re.findall(r"`([\w/]+\.py)`, (\d+) lines", text)
    found = [(name, str(len((families / name).read_text().splitlines()))) for name, _ in said]
    assert said == found
    modules = {module.removeprefix("workers.model.families.") for module in FAMILIES.values()}
    assert {name.removesuffix(".py").replace("/", ".") for name, _ in said} == modules
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []
