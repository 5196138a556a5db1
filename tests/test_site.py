"""The site of the documents: it builds strictly, its links hold, and it asks nothing of the network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import nla

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'nla[docs]'"),
]

FETCHED = {"src", "srcset", "poster", "data", "action", "formaction", "background"}
"""Attributes whose address a browser fetches, whatever the element."""


def build(project: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT, out)
    assert built.returncode == 0, built.stderr
    return out.resolve()


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.styles: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value or "")
            elif name in FETCHED or (name in ("href", "xlink:href") and tag != "a"):
                self.fetched.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "style":
                self.styles.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles.append(data)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Every page by its file, but for the one of a server's error 404, whose addresses are a server's."""
    files = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    return {path: Page(path.read_text(encoding="utf-8")) for path in files}


def addresses_in_css(text: str) -> list[str]:
    """What a style sheet fetches."""
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
    return [address for both in found for address in both if address]


def test_every_link_leads_to_a_file_and_an_anchor_of_the_site(pages: dict[Path, Page]) -> None:
    n_links = 0
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme in ("http", "https"):
                continue
            assert not address.scheme and not address.netloc, f"{path}: {link}"
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.is_file(), f"{path}: {link}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target].anchors, f"{path}: {link}"
            n_links += 1
    assert n_links > 1000


def test_a_page_fetches_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    fetched = [(path, address) for path, page in pages.items() for address in page.fetched]
    fetched += [(path, one) for path, page in pages.items() for text in page.styles for one in addresses_in_css(text)]
    sheets = [*site.rglob("*.css"), *site.rglob("*.svg")]
    fetched += [(path, one) for path in sheets for one in addresses_in_css(path.read_text(encoding="utf-8"))]
    assert len(fetched) > 100
    for path, address in fetched:
        parts = urlsplit(address)
        if parts.scheme == "data":  # holds what it names
            continue
        assert not parts.scheme and not parts.netloc, f"{path}: {address}"
        assert not parts.path or (path.parent / unquote(parts.path)).exists(), f"{path}: {address}"


def test_the_reference_holds_every_public_name_and_every_document_is_a_page(
    site: Path, pages: dict[Path, Page]
) -> None:
    from nla import audit

    described = {anchor for page in pages.values() for anchor in page.anchors}
    for package in (nla, audit):
        for name, home in package._HOMES.items():
            assert {f"{package.__name__}.{name}", f"{home}.{name}"} & described, name
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert all((site / path.with_suffix(".html")).is_file() for path in documents)
    for name in ("index", "contributing", "changelog"):  # from README.md and its siblings
        assert (site / f"{name}.html").is_file()


NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "source": ["# A notebook\n", "Its text."]},
        {
            "cell_type": "code",
            "source": "print('said <so>')",
            "outputs": [
                {"output_type": "stream", "text": ["said <so>\n"]},
                {"output_type": "execute_result", "data": {"text/html": ["<b>shown</b>"], "text/plain": "x"}},
                {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=\n", "text/plain": "y"}},
            ],
        },
    ]
}
MENU = "nav: [{Home: index.md}, {A: contributing.md}, {B: changelog.md}, {C: other.md}, {D: bad.md}, {E: '*.ipynb'}]\n"
FAULTS = {
    "a page that is not there": ("[a](gone.md)", "gone.md"),
    "an anchor that is not there": ("[a](other.md#gone)", "gone"),
    "a file of the repository that is not there": ("[a](../nla/gone.py)", "nla/gone.py"),
    "a picture from elsewhere": ("![a](https://example.org/a.png)", "example.org"),
    "a cross-reference to nothing": ("[a][nla.gone]", "nla.gone"),
}
"""What is written on a page, and what the build says of it."""


DOCSTRING = '''def here(left: int, right: int) -> None:
    """Like :func:`{}`.

    Args:
        left, right: two
            numbers.

    Raises:
        KnownError, {}: now and then.

    >>> here(1, 2)
    """
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with the same settings and hooks, in which all is well."""
    shutil.copytree(ROOT / "docs" / "site", tmp_path / "docs" / "site")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config, n_menus = re.subn(r"^nav:\n(?:[ ]+.*\n|\n)+", "", config, flags=re.MULTILINE)
    assert n_menus == 1
    (tmp_path / "mkdocs.yml").write_text(config + MENU)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/other.md"):
        (tmp_path / name).write_text(f"# {name}\n")
    for folder in ("nla", "train", "eval"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text('def there():\n    """In a tree of its own."""\n')
    (tmp_path / "docs" / "bad.md").write_text("::: nla.here\n\n::: nla.eval.there\n\n[a](../nla/errors.py)\n")
    (tmp_path / "docs" / "one.ipynb").write_text(json.dumps(NOTEBOOK))
    (tmp_path / "nla" / "errors.py").write_text('class KnownError(Exception):\n    """Known."""\n')
    (tmp_path / "nla" / "__init__.py").write_text(DOCSTRING.format("here", "ValueError"))
    return tmp_path


def test_a_notebook_and_a_linked_file_are_pages(project: Path) -> None:
    built = build(project, project / "out")
    assert built.returncode == 0, built.stderr
    notebook = (project / "out" / "one.html").read_text(encoding="utf-8")
    for part in ("<title>A notebook", "print", "said &lt;so&gt;", "<b>shown</b>", "base64,iVBORw0KGgo=", "one.ipynb"):
        assert part in notebook, part
    described = " ".join(re.sub(r"<[^>]+>", "", (project / "out" / "bad.html").read_text(encoding="utf-8")).split())
    for part in (
        "left (int) – two numbers.",
        "right (int) – two numbers.",
        "KnownError, ValueError: now and then.",
    ):
        assert part in described, part
    assert "KnownError" in (project / "out" / "source" / "nla" / "errors.py.html").read_text(encoding="utf-8")


def test_a_fault_on_a_page_or_in_a_docstring_stops_the_build(project: Path) -> None:
    (project / "nla" / "__init__.py").write_text(DOCSTRING.format("nowhere", "LostError"))
    (project / "docs" / "bad.md").write_text("::: nla.here\n\n" + "\n\n".join(text for text, _ in FAULTS.values()))
    (project / "docs" / "forgotten.md").write_text("# In no menu\n")
    broken = build(project, project / "out")
    assert broken.returncode != 0
    for fault, (_, said) in FAULTS.items():
        assert said in broken.stderr, f"{fault}\n{broken.stderr}"
    assert "forgotten.md" in broken.stderr
    assert "nowhere, which does not exist" in broken.stderr and "LostError, which does not exist" in broken.stderr
