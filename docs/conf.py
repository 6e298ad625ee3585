"""Sphinx builds the site of these pages with this file: ``make docs``."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
release = version = _PROJECT["version"]
extensions = ["myst_parser", "docs.extensions.repository_pages"]
exclude_patterns = ["node-client", "extensions", "generate", "examples"]
nitpicky = True

myst_heading_anchors = 4
"""Anchors of headings are those that code hosts make, to which the pages link."""
suppress_warnings = ["myst.header"]
"""Some sections of the results begin at the third level."""

html_theme = "furo"
html_title = f"expertmesh {release}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
