"""``python -m docs.generate``: write the generated pages of the reference."""

from __future__ import annotations

from docs.generate.pages import PAGES, REFERENCE

if __name__ == "__main__":
    for name, text in PAGES.items():
        (REFERENCE / name).write_text(text(), encoding="utf-8")
