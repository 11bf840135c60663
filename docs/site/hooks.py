"""mkdocs hooks: add the pages of the repository's root and the list of messages, and rewrite links.

The pages are written to be read in the repository too. A link to a source file opens the file there, and leads to the
function's entry in the API pages here.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from docs.site.messages import as_markdown, messages  # noqa: E402

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\]\(([^)#\s]+)")
SOURCE = re.compile(r"\[`([\w.]+)`\]\((?:\.\./)*([\w/]+)\.py\)")
MARK = "<!-- messages -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, page, content=LINK.sub(lambda link: f"]({_inside(link[1])}", text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Inserts the messages, and turns links that lead out of docs/ into links within the site."""
    if MARK in markdown:
        markdown = markdown.replace(MARK, as_markdown(messages(ROOT)))
    for name, inside in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({inside}")
    return SOURCE.sub(_reference, markdown)


def _inside(target: str) -> str:
    """Returns a target relative to docs/ instead of the root."""
    return PAGES.get(target, target.removeprefix("docs/"))


def _reference(link: re.Match[str]) -> str:
    """Returns a link to a source file as a reference to the API entry of its text."""
    name, file = link[1], link[2].replace("/", ".")
    return f"[`{name}`][{file}.{name}]"
