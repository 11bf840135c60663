"""What the built documentation has beside the pages of docs/: those of the repository's root, and all messages.

The pages are written to be read in the repository too. There a link to a source file opens the file; here it leads to
the function's place among the API pages, which show its source.
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
    """The pages that lie outside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, page, content=LINK.sub(lambda link: f"]({_inside(link[1])}", text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links that lead out of docs/ lead to what the site has of them."""
    if MARK in markdown:
        markdown = markdown.replace(MARK, as_markdown(messages(ROOT)))
    for name, inside in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({inside}")
    return SOURCE.sub(_reference, markdown)


def _inside(target: str) -> str:
    """The same target, seen from docs/ instead of the root."""
    return PAGES.get(target, target.removeprefix("docs/"))


def _reference(link: re.Match[str]) -> str:
    """A name in a source file as a reference to its API entry."""
    name, file = link[1], link[2].replace("/", ".")
    return f"[`{name}`][{file}.{name}]"
