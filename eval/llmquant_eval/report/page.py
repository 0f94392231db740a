"""Pages that need nothing else: no network, no library. What they have in common is in
``templates/head.html``; a content security policy there forbids them to load anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

HEAD = Path(__file__).parent / "templates" / "head.html"


def render_page(
    template: Path, title: str, parts: Mapping[str, str], *, scripts: bool = False
) -> str:
    """A whole page.

    Args:
        template: HTML with ``{{head}}`` at its start and ``{{NAME}}`` for each part.
        title: as text.
        parts: name → HTML, every text in it escaped.
        scripts: whether the template's own scripts may run.
    """
    own = {"title": escape(title), "scripts": "script-src 'unsafe-inline'; " if scripts else ""}
    return _filled(template, {"head": _filled(HEAD, own), **parts})


def _filled(template: Path, parts: Mapping[str, str]) -> str:
    """In one pass: what a text says is never taken for a place to fill."""
    page = template.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)
