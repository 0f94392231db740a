"""MkDocs hook: pages outside docs/ join the site, and links work there as in a checkout.

In the repository a page of docs/ links to ``../bench/README.md``, and that page links back to
``../docs/quality.md``. In the site both lie under one root, docs/ without its folder name. So each
link is resolved as a path of the repository first:

    docs/NAME.md       the site's NAME.md
    one of OUTSIDE     the same path, below the site's root
    another file       no page of the site: its words stay, the link goes
    nothing            left as it is, and ``mkdocs build --strict`` fails on it
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "bench/README.md",
    "eval/LEADERBOARD.md",
    "recipes/README.md",
    "serve/README.md",
)
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of OUTSIDE."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of one page."""
    here = page.file.src_uri
    return rewritten(markdown, here if here in OUTSIDE else f"docs/{here}")


def rewritten(markdown: str, page: str) -> str:
    """The text of ``page`` (a path of the repository) with links that hold in the site."""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path.startswith("docs/") or path in OUTSIDE:
            base = posixpath.dirname(_in_site(page)) or "."
            return f"[{words}]({posixpath.relpath(_in_site(path), base)}{anchor})"
        return words if (ROOT / path).exists() else found.group(0)

    return _LINK.sub(link, markdown)


def _in_site(path: str) -> str:
    return path.removeprefix("docs/")
