"""Pages of ``docs/results``: sections between markers, and the machine of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "results"
"""The pages that ``make bench`` writes."""
_HEAD = "# Benchmark results\n"


def put_section(text: str, name: str, body: str) -> str:
    """Return the text of a page with one section replaced, or added at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{body.strip()}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: section, text)
    return f"{(text or _HEAD).rstrip()}\n\n{section}\n"


def write_section(file: Path, name: str, body: str) -> None:
    """Apply ``put_section`` to a file, which may not exist yet."""
    text = file.read_text() if file.exists() else ""
    file.write_text(put_section(text, name, body))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with text in the first column and numbers in the others."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def machine(command: str) -> str:
    """Return a line with the command, date, machine, versions and load average."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "ray", "transformers"))
    return (
        f"`{command}` on {today}: {_cpu_model()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {versions}; load average at the end "
        f"{os.getloadavg()[0]:.1f}."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not on Linux
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()
