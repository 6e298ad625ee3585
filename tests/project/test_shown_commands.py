"""Every block of commands in the documents names the test that runs it, or what it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.run import SECTIONS
from docs.extensions.repository_pages import DOCS
from tests.paths import ROOT

PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
TEXTS = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
LITERAL = {
    "tutorial/first-cluster.md": "tests/project/test_tutorial.py",
    "tutorial/three-hosts.md": "tests/pretend_hosts/test_tutorial.py",
    "how-to/own-checkpoint.md": "tests/project/test_tutorial.py",
}
"""Pages whose console blocks are compared word by word, with the test that does so."""
NEEDS = {
    *("Claude Code", "GPU", "Kubernetes", "docker", "grpcurl"),
    "ten minutes, and a machine of its own",
    "the extra kv-events, and a router that subscribes",
}
_SHELLS = ("sh", "bash", "console")
_PROGRAMS = "make|curl|expertmesh|grpcurl|kubectl|docker|kind|python|git|\\.venv/bin"


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language of every fenced block, and the line before it."""
    found = re.findall(r"^(.*)\n *```(\w*)\n(?:.*\n)*? *```$", text, re.M)
    yield from ((language, before.strip()) for before, language in found)


def outside_of_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_has_its_mark(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for language, before in blocks(text):
        if language not in _SHELLS or (language == "console" and page in LITERAL):
            continue
        mark = re.fullmatch(r"<!-- (run|needs): (.+) -->", before)
        assert mark is not None, f"no mark before a block of {language}: {before}"
        if mark[1] == "needs":
            assert mark[2] in NEEDS
            continue
        for name in mark[2].split(", "):
            path, _, test = name.partition("::")
            source = (ROOT / path).read_text(encoding="utf-8")
            assert f"def {test or 'test_'}" in source, name


@pytest.mark.parametrize("page", PAGES)
def test_no_commands_are_outside_of_blocks(page: str) -> None:
    text = outside_of_fences((DOCS / page).read_text(encoding="utf-8"))
    assert re.findall(rf"^(?: {{4,}}|\t)(?:{_PROGRAMS})\b.*$", text, re.M) == []


@pytest.mark.parametrize("page", LITERAL)
def test_a_literal_page_is_run(page: str) -> None:
    source = (ROOT / LITERAL[page]).read_text(encoding="utf-8")
    assert f'"{Path(page).name}"' in source


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in TEXTS])
def test_modules_and_targets_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for module in re.findall(r"python\s+-m\s+((?:benchmarks|tests|docs)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for target in re.findall(r"(?:`|^ *\$? ?|^ {4})make ([a-z][a-z-]*)", text, re.M):
        assert re.search(rf"^{target}[ :]", makefile, re.M), target
    for section in re.findall(r"benchmarks\.run\s+--only\s+(\w+)", text):
        assert section in SECTIONS, section
