"""Pages of the site whose text is a file elsewhere in the repository, and links to such files.

``repository/changes.md``, say, is a page of one link; the site shows ``CHANGELOG.md`` there.
A link of any page to a file that has such a page leads to this page. A link to another file outside
``docs`` offers the file as a download (MyST does that), and one to a folder is shown as text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
SHOWN = {
    "repository/readme": ROOT / "README.md",
    "repository/changes": ROOT / "CHANGELOG.md",
    "repository/contributing": ROOT / "CONTRIBUTING.md",
    "repository/security": ROOT / "SECURITY.md",
    "repository/conduct": ROOT / "CODE_OF_CONDUCT.md",
    "repository/results": ROOT / "benchmarks" / "RESULTS.md",
}
"""The file that each of these pages shows."""
_LINK = re.compile(r"(!?)\[([^]\n]+(?:\n[^]\n]+)?)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
"""A link or an image."""


def site_text(text: str, written_in: Path, shown_in: Path) -> str:
    """``text`` of the file ``written_in`` with its links as the page ``shown_in`` needs them."""
    pages = {file: DOCS / f"{name}.md" for name, file in SHOWN.items()}

    def link(found: re.Match[str]) -> str:
        mark, label, target, anchor = found[1], found[2], found[3], found[4] or ""
        file = (written_in.parent / target).resolve()
        if file.is_dir():
            return label
        path = os.path.relpath(pages.get(file, file), shown_in.parent)
        return f"{mark}[{label}]({path}{anchor})"

    return _LINK.sub(link, text)


def _on_source_read(app: Sphinx, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    written_in = SHOWN.get(name, page)
    text = source[0] if written_in == page else written_in.read_text(encoding="utf-8")
    source[0] = site_text(text, written_in, page)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
