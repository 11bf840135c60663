"""The documentation: a site without a network, links that lead somewhere, and pages that cannot go stale."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from docs.site.docstrings import LETTERS, markdown
from docs.site.messages import TOPIC_OF, called, messages, sources
from tests.conftest import ROOT
from tests.documentation import PAGES, anchors, links, rows

MARKDOWN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SAID = messages(ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the site; every page is in the navigation, every link and reference inside it leads somewhere."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_documentation_site_loads_nothing_from_a_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe|link rel="stylesheet")[^>]*? (?:src|href)="([^"]+)"', page.read_text()
        )
        assert loaded and not [url for url in loaded if "//" in url], page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_documentation_site_works_from_disk_at_desktop_and_phone_width(width: int, browser: Any, site: Path) -> None:
    complaints: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 900}, offline=True) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        for name in ("index", "tour", "messages", "api/models"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width, name
        # On a phone the search is behind a button, which puts the focus into its field.
        page.click(".md-search__input" if width == 1280 else "label.md-header__button[for=__search]")
        page.wait_for_function("document.activeElement.matches('.md-search__input')")
        page.keyboard.type("lanes")
        page.wait_for_selector(".md-search-result__item")
    assert complaints == []


@pytest.mark.slow
def test_tables_of_shapes_keep_their_columns_on_the_site(site: Path) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / "api" / "use.html").read_text())
    assert "images  [B, C, H, W]  normalised\nnoise   [B, N]        uniform\n" in shown


def test_docstring_converts_to_escaped_markdown_and_fenced_tables() -> None:
    table = ["sizes   [S]  samples", "lanes        sequences", "    and more"]
    text = "\n".join(["Patches [B, n] of *all*, in `step-*.ckpt`.", "", *table, "", "End."])
    prose, fenced, end = markdown(text).split("\n\n")
    assert prose == r"Patches \[B, n\] of \*all\*, in `step-*.ckpt`."
    assert fenced.splitlines() == ["```text", *table, "```"]
    assert end == "End."
    long = ["sizes   [S]  samples", f"lanes   [L]  {' '.join(['sequences'] * 12)}", "             and more"]
    wrapped = markdown("\n".join(long)).splitlines()[1:-1]
    assert wrapped[1].startswith("lanes   [L]  sequences") and wrapped[2].startswith("             sequences")
    assert max(map(len, wrapped)) <= LETTERS and " ".join(wrapped).split() == " ".join(long).split()


@pytest.mark.parametrize("page", MARKDOWN, ids=[page.name for page in MARKDOWN])
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in links(page):
        target = urlsplit(link)
        if target.scheme:
            assert target.scheme == "https" and target.netloc, link
            continue
        file = page.parent / target.path if target.path else page
        assert file.exists(), link
        assert not target.fragment or target.fragment in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_names_that_link_to_a_source_file_are_defined_there(page: Path) -> None:
    for name, file in re.findall(r"\[`([\w.]+)`\]\(((?:\.\./)?[\w/]+\.py)\)", page.read_text()):
        scope: ast.AST = ast.parse((page.parent / file).read_text())
        for part in name.split("."):
            inside = [node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == part]
            assert inside, f"{file} has no {name}"
            scope = inside[0]


def test_raised_errors_are_listed_as_messages_or_pass_another_one_on() -> None:
    listed = {(message.file, message.line) for message in SAID if message.text}
    handed_on = re.compile(r"error\b|reason")
    for file in sources(ROOT):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and called(node.exc) in TOPIC_OF:
                given, place = ast.unparse(node.exc.args[0]), (str(file.relative_to(ROOT)), node.exc.lineno)
                assert place in listed or handed_on.search(given), (place, given)


def test_messages_quoted_in_troubleshooting_exist_in_the_source() -> None:
    said = [message.text for message in SAID]
    quoted = [row[0].strip("`") for row in rows(ROOT / "docs" / "troubleshooting.md") if row[0].startswith("`")]
    assert len(quoted) > 25
    for sentence in quoted:
        pattern = ".*".join(map(re.escape, sentence.split("…")))
        assert any(re.fullmatch(pattern, text, re.DOTALL) for text in said), sentence


def test_table_of_recipes_lists_each_recipe_with_its_state() -> None:
    table = {name: row for row in rows(ROOT / "docs" / "recipes.md") for name in re.findall(r"`(\w+)`", row[0])}
    for file in (ROOT / "conf" / "experiment").glob("*.yaml"):
        row, head = table[file.stem], " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
        assert ("ot yet run" in row[-1]) == ("ot yet run" in head), file.stem


def test_fences_name_their_language_since_indented_blocks_are_commands() -> None:
    for page in MARKDOWN:
        assert not [fence for fence in re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2] if not fence], (
            page
        )
