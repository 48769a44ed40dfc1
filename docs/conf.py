"""The site: every page of docs/, the README in front, and an API reference out of the docstrings.

make docs            # builds docs/_build/html; a warning is an error. DOCS_VERSION=dev: what its pages say they are of
"""

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from internseg_ds.version import VERSION

ROOT, DOCS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
OUTSIDE = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changes.md",
}
"""Files of the root that are pages of the site, and the page that each one is."""

project = "internseg_ds"
version = release = VERSION
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"internseg_ds {os.environ.get('DOCS_VERSION', VERSION).removeprefix('v')}"
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # anchors as GitHub makes them
myst_links_external_new_tab = True
highlight_language = "none"  # blocks of commands and output carry no language

# docstrings are Markdown's little cousin: `code`, paragraphs, no reStructuredText
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90


def plain_docstring(
    app: Sphinx, what: str, name: str, object_: object, options: Any, lines: list[str]
) -> None:
    """Has reStructuredText show a docstring as it is written, in place."""
    lines[:] = [_escaped(line) for line in lines]


def _escaped(line: str) -> str:
    """A line whose asterisks, bars and underscores outside of `code` mean themselves."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if index % 2 else re.sub(r"([*|\\]|_\b)", r"\\\1", part) for index, part in enumerate(parts)
    )


def on_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts a file of the root in the place of its page, and links as they are on the site."""
    page = DOCS / f"{docname}.md"
    origin = next((file for file, name in OUTSIDE.items() if name == page.name), page)
    text = source[0] if origin is page else origin.read_text() + source[0]
    source[0] = re.sub(
        r"(!?)\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)", lambda match: _link(origin.parent, *match.groups("")), text
    )


def _link(folder: Path, image: str, text: str, target: str, anchor: str) -> str:
    """A link of a file in `folder`: to a page or picture as seen from docs/; to any other file of the checkout, which
    is not on the site, its text alone."""
    path = (folder / target).resolve()
    if path in OUTSIDE:
        return f"{image}[{text}]({OUTSIDE[path]}{anchor})"
    if path.is_relative_to(DOCS):
        return f"{image}[{text}]({path.relative_to(DOCS)}{anchor})"
    return text if text.startswith("`") else f"`{text}`"


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("source-read", on_the_site)
